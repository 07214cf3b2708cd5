"""Training on a GPU beside what else one would train with: images/s, share of the products' ceiling, memory.

    bash scripts/gpu_bench_train.sh [PART ...]

One process for each contender, the fast path first and once more last: how far the two are apart is the noise. Latents
are drawn, on the device, in more items than a batch, with labels of all classes.
"""

import functools
import time
from contextlib import contextmanager

import torch

from benchmarks import curves, gpu, gpu_feeding, gpu_parts, networks
from benchmarks.gpu_contenders import Way, compile_plain, host_times, in_turn, taking, use_best_attention
from benchmarks.gpu_parts import Part, attempt
from benchmarks.measure import spread
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, REFERENCE
from benchmarks.training import Latents, Ours, Plain, TrainingStep
from benchmarks.workloads import relative_error
from lfm_fast.train.config import TrainConfig

GRAPH, PURE, FP8 = "fast path, CUDA graph", "fast path, bf16-pure", "fast path, fp8"
SHIPPED, FLOAT32, TF32 = "fast path, opt-in kernels left out", f"{EAGER}, float32", f"{EAGER}, TF32"
TOKENS = 256  # of an image at 256 px and patch 2
STEPS_AT_ONCE = 5  # that the host issues before it waits for the device
# network -> (images/s, ratio to torch.compile) wanted of an H200 at 256 px
WANTED = {"DiT-XL/2": (650, 1.25), "DiT-B/2": (2900, 1.35), "DiT-S/2": (8000, 1.5), "DiT-L/2": (None, None)}
OVER_EAGER, FP8_OVER_BF16, ACTIVATIONS = {"DiT-XL/2": 2.5}, 1.25, 200e6
_SMALL, _SMOKE_BATCH = "DiT-Emoji/4", 3


def _ours(cuda_graph: bool = False):
    def build(workload: TrainingStep, smoke: bool) -> Ours:
        return Ours(workload, "off" if smoke else "block", cuda_graph)

    return build


def _eager(workload: TrainingStep, smoke: bool) -> Ours:
    return Ours(workload, "off")


def _plain(make: str, compiled: bool = False):
    def build(workload: TrainingStep, smoke: bool) -> Plain:
        model = workload.built(getattr(networks, make))
        if compiled:
            use_best_attention(workload.network, workload.images, TOKENS, training=True)
            compile_plain(model, smoke, "max-autotune-no-cudagraphs")
        return Plain(workload, model)

    return build


# those first that matter most: where time runs out, the last are left out. max-autotune takes minutes: it follows ours
WAYS = {
    FAST: Way(_ours(), rows="all"),
    EAGER: Way(_plain("network")),
    GRAPH: Way(_ours(cuda_graph=True), rows="all", graph=True),
    FP8: Way(_ours(), "fp8", "all"),
    AGAIN: Way(_ours(), rows="all"),
    COMPILED: Way(_plain("network", compiled=True)),
    REFERENCE: Way(_eager, rows="reference"),
    DIFFUSERS: Way(_plain("diffusers_network"), package="diffusers"),
    DIFFUSERS_COMPILED: Way(_plain("diffusers_network", compiled=True), package="diffusers"),
    PURE: Way(_ours(), "bf16-pure", "all"),
    TF32: Way(_plain("network"), "tf32"),
    FLOAT32: Way(_plain("network"), "float32"),
    SHIPPED: Way(_ours(), rows="shipped"),
}
MAIN = (FAST, EAGER, COMPILED)


def measured(name: str, told: dict) -> dict:
    """What is known of one contender, in plain values: {"error", "seconds", "images_per_second", ...}."""
    way, device, smoke = WAYS[name], gpu.device(), told["smoke"]
    began = time.perf_counter()
    with taking(way.rows):
        batch_size = told["batch_size"]
        workload = TrainingStep(batch_size, way.precision, told["network"], device, num_items=4 * batch_size)
        runner = way.build(workload, smoke)
        runner.step()
        gpu.wait(device)
        facts = {"first_step_seconds": time.perf_counter() - began}
        facts["error"] = relative_error(runner.result(), workload.truth())
        facts["right"] = facts["error"] <= way.largest_error
        gpu.release(device)
        rounds = {"seconds": 0.0, "at_once": 1, "fewest": 1} if smoke else {"seconds": 5.0, "at_once": STEPS_AT_ONCE}
        seconds = host_times(runner.step, device, **rounds)
        facts["seconds"] = spread(seconds)
        facts["images_per_second"] = batch_size / facts["seconds"]["median"]
        facts["flops_per_second"] = workload.flops / facts["seconds"]["median"]
        facts["update_share"] = _update_seconds(runner, device) / facts["seconds"]["median"]
        facts["step_bytes"] = gpu.peak_bytes(runner.step, device)
        facts["all_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        facts["activation_bytes"] = _activations(runner, device) if name != GRAPH else None
    return facts


@contextmanager
def _instead(owner, name: str, function):
    """Within: an object's method, or what it calls, is this one."""
    before = getattr(owner, name)
    had = name in vars(owner)
    setattr(owner, name, functools.partial(function, before))
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)


def _update_seconds(runner, device) -> float:
    """Of AdamW and the average of the weights in a step, by the device's clock."""
    marks = []

    def timed(update, *args, **kwargs):
        start = gpu.mark(device)
        update(*args, **kwargs)
        marks.append((start, gpu.mark(device)))

    with _instead(*runner.update, timed):
        for _ in range(3):
            runner.step()
    gpu.wait(device)
    return gpu.median([gpu.between(start, end) for start, end in marks])


def _activations(runner, device) -> int | None:
    """Bytes that wait for the backward pass when the forward pass has ended."""
    held = []

    def watched(network, *args, **kwargs):
        before = torch.cuda.memory_allocated(device)
        velocity = network(*args, **kwargs)
        held.append(torch.cuda.memory_allocated(device) - before)
        return velocity

    if device.type == "cuda":
        with _instead(*runner.network, watched):
            runner.step()
    return held[0] if held else None


def compare(results: gpu.Results, network: str, batch_size: int, names=None, longest: float = 340.0) -> None:
    """A line for each contender as it comes, then the ratios."""
    products = gpu.ceilings(results.smoke)["gemm_flops_per_second"]["bfloat16"]
    gpu.release(results.device)
    network, batch_size = (_SMALL, _SMOKE_BATCH) if results.smoke else (network, batch_size)
    title, found = f"{network}, {batch_size} images", {}
    told = {"network": network, "batch_size": batch_size}
    wanted, over_compiled = WANTED.get(network, (None, None))
    for name, facts in in_turn(results, {name: WAYS[name] for name in names or WAYS}, measured, longest, title, told):
        found[name] = facts
        facts["mfu"] = facts["flops_per_second"] / products
        rate = facts["images_per_second"]
        results.add(f"{title}, {name}", rate, "images/s", wanted if name in (FAST, GRAPH) else None, **facts)
        if name == FAST:
            results.add(f"{title}, {name}, share of the products' ceiling", facts["mfu"], "of GEMM")
            results.add(f"{title}, {name}, AdamW and average", facts["update_share"], "of the step")
            if facts["activation_bytes"] is not None:
                limit = ACTIVATIONS if network == "DiT-XL/2" else None
                reached = facts["activation_bytes"] / batch_size
                results.add(f"{title}, {name}, activations", reached, "bytes/image", limit, at_most=True)
    _ratios(results, title, network, found, over_compiled)


def _ratios(results: gpu.Results, title: str, network: str, found: dict, over_compiled: float | None) -> None:
    """The fast path's images/s over those of the others; eagerly or in a graph, whichever is faster."""
    rates = {name: facts["images_per_second"] for name, facts in found.items()}
    if FAST not in rates:
        return
    best = max(rates[name] for name in (FAST, GRAPH) if name in rates)
    wanted = {COMPILED: over_compiled, EAGER: OVER_EAGER.get(network)}
    for name in (COMPILED, EAGER, DIFFUSERS, DIFFUSERS_COMPILED, REFERENCE):
        if name in rates:
            results.add(f"{title}, fast path over {name}", best / rates[name], "x", wanted.get(name))
    if FP8 in rates:
        large = network in ("DiT-XL/2", "DiT-L/2")
        results.add(f"{title}, fp8 over bf16", rates[FP8] / best, "x", FP8_OVER_BF16 if large else None)
    if AGAIN in rates:
        results.add(f"{title}, the fast path again over the first time", rates[AGAIN] / rates[FAST], "x")


def gate(results: gpu.Results) -> None:
    """Correct first: loss curves of 500 steps beside those of the reference path from two seeds."""
    smoke, device = results.smoke, gpu.device()
    network, steps = (_SMALL, 4) if smoke else ("DiT-S/2", 500)
    settings = {"data": "memory", "model": network, "batch_size": _SMOKE_BATCH if smoke else 32, "steps": steps}
    settings |= {"learning_rate": 5e-4, "warmup_steps": steps // 10, "num_classes": networks.NUM_CLASSES}
    settings |= {"label_dropout": networks.LABEL_DROPOUT, "device": device.type, "precision": "bf16", "compile": "off"}
    source = Latents(64, device)
    runs = {"seed 0": {}, "seed 1": {"seed": 1}, "seed 0 in 2 parts": {"accumulation_steps": 2}}
    found = {}
    with taking("reference"):
        for name, more in runs.items():
            with attempt(results, f"reference path, {name}"):
                found[name] = curves.losses(TrainConfig(**{**settings, **more}), source, True)
    first = found.get("seed 0")
    if first is None or "seed 1" not in found:
        results.not_run("the fast path beside the reference path", "two seeds of that are not there")
        return
    seeds = curves.difference(first, found["seed 1"])
    results.add("two seeds of the reference path", seeds, "of loss", curve=first, other=found["seed 1"])
    if "seed 0 in 2 parts" in found:
        parts = curves.difference(first, found["seed 0 in 2 parts"])
        results.add("one seed, the batch in 2 parts", parts, "of loss")
    ways = {FAST: "bf16", **({FP8: "fp8"} if device.type == "cuda" else {}), PURE: "bf16-pure"}
    with taking("all"):
        for name, precision in ways.items():
            how, title = "off" if smoke else "block", f"{name} from the reference path"
            with attempt(results, title):
                config = TrainConfig(**{**settings, "precision": precision, "compile": how})
                curve = curves.losses(config, source, False)
                off = curves.difference(curve, first)
                results.add(title, off, "of loss", seeds, at_most=True, right=off <= seeds, curve=curve)


def xl(results: gpu.Results) -> None:
    """DiT-XL/2, 128 images."""
    compare(results, "DiT-XL/2", 128)


def large(results: gpu.Results) -> None:
    """DiT-L/2, 128 images."""
    compare(results, "DiT-L/2", 128)


def base(results: gpu.Results) -> None:
    """DiT-B/2, 128 images."""
    compare(results, "DiT-B/2", 128)


def small(results: gpu.Results) -> None:
    """DiT-S/2, 128 images."""
    compare(results, "DiT-S/2", 128)


def batches(results: gpu.Results) -> None:
    """32 and 256 images of DiT-XL/2, B/2 and S/2: the fast path, compiled and eager PyTorch."""
    sizes = [(network, size) for network in ("DiT-XL/2", "DiT-S/2", "DiT-B/2") for size in (32, 256)]
    for network, size in gpu_parts.until(results, sizes[:1] if results.smoke else sizes, reserve=60.0):
        with attempt(results, f"{network}, {size} images"):
            compare(results, network, size, MAIN)


PARTS = {
    "gate": Part(gate, 300),
    "xl": Part(xl, 480),
    "small": Part(small, 300),
    "base": Part(base, 300),
    "latents": Part(gpu_feeding.latents, 150),
    "large": Part(large, 420),
    "images": Part(gpu_feeding.images, 150),
    "batches": Part(batches, 560, usual=False),
}


def main(arguments: list[str] | None = None) -> int:
    return gpu_parts.main("training", "benchmarks.gpu_training", PARTS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
