"""Sampling on a GPU beside what else one would sample with: latency of an image, images/s, time at equal error, VAE.

    bash scripts/gpu_bench_sample.sh [PART ...]

Guided by Heun's method, 25 steps, hence 50 evaluations of two network rows an image. One process for each contender.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import lfm_fast
from benchmarks import autoencoders, gpu, gpu_parts, gpu_starting, networks
from benchmarks.gpu_contenders import Way, compile_plain, host_times, in_turn, taking, use_best_attention
from benchmarks.gpu_parts import Part, attempt, each
from benchmarks.measure import spread
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, FAST_COMPILED, REFERENCE
from benchmarks.networks import GuidedSampling
from benchmarks.solving import AT_EQUAL_ERROR, SCALE, AtEqualError
from benchmarks.workloads import Contender, relative_error
from lfm_fast.autoencoder import Autoencoder

GRAPH, GRAPH_AGAIN, BLOCKS = "fast path, CUDA graph", "fast path, CUDA graph, again", "fast path, compiled, CUDA graph"
FP8, SAMPLER, BLOCKS_EAGER = "fast path, fp8, CUDA graph", "fast path, kept Sampler", "fast path, blocks compiled"
SHIPPED = "fast path, opt-in kernels left out"
NUM_STEPS = 25
# network -> wanted of an H200: seconds of an evaluation for one image, of which ratios to others
LATENCY = {"DiT-XL/2": 1.3e-3, "DiT-S/2": 0.15e-3}
OVER_EAGER, OVER_COMPILED = {"DiT-XL/2": 4.0}, {"DiT-XL/2": 1.3}
IMAGES, IMAGES_FP8, IMAGES_OVER_COMPILED = 20.0, 27.0, 1.2  # a second, of DiT-XL/2
ENCODED, DECODED, OVER_PLAIN_VAE = 1200.0, 550.0, 2.0
_SMALL = "DiT-Emoji/4"
_LONGEST_RUN = 240.0  # seconds of a contender


def _fast(precision: str = "bfloat16", blocks: bool = False, graph: bool = True, kept: bool = True):
    """The library: `optimize`, its blocks compiled or not; kept, a Sampler, else lfm_fast.sample for every batch.

    Builds sample() -> z_0, as the other ways do.
    """

    def build(workload: GuidedSampling, smoke: bool) -> Callable[[], Tensor]:
        model = networks.fast_network(precision, workload.name, workload.device)
        if blocks:
            model.compile("block", **({"backend": "eager"} if smoke else {}))
        if not kept:
            return lambda: workload.ours(model, workload.num_steps, workload.z_1)
        settings = {"guidance_scale": workload.scale, "null_label": workload.null_label, "method": workload.method}
        sampler = lfm_fast.Sampler(
            model, workload.z_1.shape, num_steps=workload.num_steps, cuda_graph=graph, **settings
        )
        return functools.partial(sampler, workload.z_1, workload.y)

    return build


def _plain(make: str, compiled: bool = False):
    """The network in a loop by hand; compiled with CUDA graphs of its own."""

    def build(workload: GuidedSampling, smoke: bool) -> Callable[[], Tensor]:
        model = getattr(networks, make)("bfloat16", workload.name, workload.device)
        if compiled:
            use_best_attention(workload.name, 2 * workload.images, 256, training=False)
            compile_plain(model, smoke, "max-autotune")
        return lambda: workload.by_hand(model, workload.num_steps, workload.z_1)

    return build


def _reference(workload: GuidedSampling, smoke: bool) -> Callable[[], Tensor]:
    model = networks.network("bfloat16", workload.name, workload.device)
    return lambda: workload.ours(model, workload.num_steps, workload.z_1)


# those first that matter most: where time runs out, the last are left out
WAYS = {
    GRAPH: Way(_fast(), rows="all", graph=True),
    BLOCKS: Way(_fast(blocks=True), rows="all", graph=True),
    COMPILED: Way(_plain("network", compiled=True)),
    EAGER: Way(_plain("network")),
    FP8: Way(_fast("fp8"), "fp8", "all", graph=True),
    GRAPH_AGAIN: Way(_fast(), rows="all", graph=True),
    FAST: Way(_fast(kept=False), rows="all"),
    SAMPLER: Way(_fast(graph=False), rows="all"),
    BLOCKS_EAGER: Way(_fast(blocks=True, graph=False), rows="all"),
    REFERENCE: Way(_reference, rows="reference"),
    DIFFUSERS: Way(_plain("diffusers_network"), package="diffusers"),
    DIFFUSERS_COMPILED: Way(_plain("diffusers_network", compiled=True), package="diffusers"),
    SHIPPED: Way(_fast(kept=False), rows="shipped"),
}
FASTEST = (GRAPH, BLOCKS)
MAIN = (*FASTEST, COMPILED, EAGER, FP8)


def measured(name: str, told: dict) -> dict:
    """What is known of one contender, in plain values."""
    way, device, smoke = WAYS[name], gpu.device(), told["smoke"]
    began = time.perf_counter()
    with taking(way.rows):
        workload = GuidedSampling(told["images"], told["num_steps"], "bfloat16", "heun", told["network"], device)
        sample = call = way.build(workload, smoke)
        z_0 = sample()
        gpu.wait(device)
        facts = {"first_seconds": time.perf_counter() - began, "error": _error(z_0, told, device)}
        facts["right"] = facts["error"] <= way.largest_error
        if told["decode"]:
            decode = _decoder(told["decode"], name, device, smoke)

            def call():
                return decode(sample())

        gpu.release(device)
        fewest = 1 if smoke else told["fewest"]
        seconds = host_times(call, device, 0.0 if smoke else 5.0, 1, fewest)
        facts["seconds"], facts["evaluations"] = spread(seconds), workload.nfe
        facts["p99"] = statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
        facts["runs"], facts["images_per_second"] = len(seconds), workload.images / facts["seconds"]["median"]
        facts["peak_bytes"] = gpu.peak_bytes(call, device)
    return facts


def _error(z_0: Tensor, told: dict, device) -> float:
    """Of the first two samples, which have the same noise and labels in a batch of their own."""
    count = min(2, told["images"])
    with taking("reference"):
        few = GuidedSampling(count, told["num_steps"], "bfloat16", "heun", told["network"], device)
        return relative_error([z_0[:count]], few.truth())


def _decoder(shape: str, name: str, device, smoke: bool) -> Callable[[Tensor], Tensor]:
    """sd-vae's network in bfloat16: the library's form for the library's ways, else as it is, compiled or eager."""
    plain = autoencoders.network(shape).to(device)
    if WAYS[name].rows in ("all", "shipped"):
        return Autoencoder(plain, shape, "bf16").decode
    plain = plain.to(torch.bfloat16).to(memory_format=torch.channels_last)
    scale = Autoencoder(plain, shape).scaling_factor
    run = functools.partial(autoencoders.run, plain, "decode")
    if name in (COMPILED, DIFFUSERS_COMPILED):
        plain.decode = torch.compile(plain.decode, backend="eager" if smoke else "inductor")

    def decode(latents):
        x = (latents / scale).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        return run(x)[0].float().clamp(-1, 1)

    return decode


def latency(results: gpu.Results) -> None:
    """One image: seconds of an evaluation, p50 and p99, of DiT-XL/2 and DiT-S/2."""
    known = {network: {} for network in ((_SMALL,) if results.smoke else ("DiT-XL/2", "DiT-S/2"))}
    rest = tuple(name for name in WAYS if name not in MAIN)
    for names in (MAIN, rest):  # of both networks those that matter, before the others of either
        for network, found in known.items():
            _latency(results, network, names, found)


def _latency(results: gpu.Results, network: str, names: tuple[str, ...], found: dict) -> None:
    told = {
        "network": network,
        "images": 1,
        "num_steps": 2 if results.smoke else NUM_STEPS,
        "decode": None,
        "fewest": 100,
    }
    title, limit = f"{network}, 1 image", LATENCY.get(network)
    for name, facts in in_turn(results, {n: WAYS[n] for n in names}, measured, _LONGEST_RUN, title, told):
        found[name] = facts
        wanted = 1e3 * limit if limit and name in FASTEST else None
        half, last = (1e3 * x / facts["evaluations"] for x in (facts["seconds"]["median"], facts["p99"]))
        note = f"p99 {last:.3g} ms"
        results.add(f"{title}, {name}", half, "ms/evaluation", wanted, at_most=True, note=note, **facts)
    wanted = {EAGER: OVER_EAGER.get(network), COMPILED: OVER_COMPILED.get(network)}
    _ratios(results, title, found, names, wanted)


def throughput(results: gpu.Results) -> None:
    """64 images of DiT-XL/2, decoded by sd-vae's network: images/s."""
    network, images, steps, vae = (_SMALL, 2, 2, "narrow") if results.smoke else ("DiT-XL/2", 64, NUM_STEPS, "sd-vae")
    told = {"network": network, "images": images, "num_steps": steps, "decode": vae, "fewest": 3}
    title, found = f"{network}, {images} images, decoded", {}
    chosen = (*FASTEST, COMPILED, FP8, EAGER, DIFFUSERS_COMPILED, DIFFUSERS, FAST)
    for name, facts in in_turn(results, {n: WAYS[n] for n in chosen}, measured, _LONGEST_RUN, title, told):
        found[name] = facts
        wanted = IMAGES if name in FASTEST else IMAGES_FP8 if name == FP8 else None
        note = f"error {facts['error']:.1e}"
        results.add(f"{title}, {name}", facts["images_per_second"], "images/s", wanted, note=note, **facts)
    _ratios(results, title, found, chosen, {COMPILED: IMAGES_OVER_COMPILED})


def _ratios(results: gpu.Results, title: str, found: dict, names: tuple[str, ...], wanted: dict) -> None:
    """How many times as long these take as the fastest of ours in bfloat16, eager where there are no graphs."""
    seconds = {name: facts["seconds"]["median"] for name, facts in found.items()}
    ours = [seconds[name] for name in FASTEST if name in seconds] or [
        seconds[name] for name in (FAST,) if name in seconds
    ]
    for name in names if ours else ():
        if name in seconds and name not in FASTEST:
            results.add(f"{title}, {name}, times as long", seconds[name] / min(ours), "x", wanted.get(name))


def equal_error(results: gpu.Results) -> None:
    """The flow that ships, 64 samples: our method against torchdiffeq's dopri5 at no larger error of a sample."""
    smoke, device, theirs = results.smoke, results.device, "torchdiffeq dopri5"
    count, steps = (2, 12) if smoke else (64, 300)
    with taking("all"):
        workload = AtEqualError("embedded", AT_EQUAL_ERROR, count, steps, rounds=1, device=device.type)
        contenders = workload.contenders()
        del contenders[AGAIN]
        contenders = {theirs: contenders.pop(theirs), **contenders}
        contenders |= _samplers(results, f"{count} samples", workload)
        rounds = {"seconds": 0.0, "fewest": 1} if smoke else {"seconds": 3.0}
        yardstick, limit = None, {}
        for name, contender in contenders.items():
            title = f"{count} samples, {theirs} over {name}"
            with attempt(results, title):
                contender.result()
                times = host_times(contender.call, device, at_once=1, **rounds)
                seconds, errors = gpu.median(times), workload.by_sample[name]
                if name == theirs:
                    yardstick, limit = seconds, errors
                more = "" if all(errors[key] <= limit[key] for key in limit) else ", more than theirs"
                note = f"error {errors['error']:.1e}, p90 {errors['error_p90']:.1e}{more}; "
                facts = {"note": f"{note}{workload.nfe[name]:g} evaluations", "seconds": spread(times), **errors}
                if yardstick is None:  # theirs failed
                    results.add(f"{count} samples, {name}", seconds, "s", **facts)
                else:
                    results.add(title, yardstick / seconds, "x", **facts)


def _samplers(results: gpu.Results, title: str, workload: AtEqualError) -> dict[str, Contender]:
    """The same method kept between batches, in float32 and on the fast network in bfloat16; graphs where there are."""
    settings = {"null_label": workload.null_label, "guidance_scale": SCALE, **AT_EQUAL_ERROR}
    settings["cuda_graph"] = results.device.type == "cuda"
    nfe = lfm_fast.solvers.get_solver(settings["method"]).evaluations(settings["num_steps"])
    models = {"kept, float32": lambda: workload.model}
    models["kept, fast network, bfloat16"] = lambda: lfm_fast.optimize(workload.model)
    names = {f"{FAST}, {words}": (f"{FAST}, {words}", model) for words, model in models.items()}

    def contender(named):
        name, model = named[0], named[1]()
        call = functools.partial(lfm_fast.Sampler(model, workload.z_1.shape, **settings), workload.z_1, workload.y)
        return Contender(call, lambda: workload.noted(name, call(), nfe))

    return each(results, title, names, contender)


def vae(results: gpu.Results) -> None:
    """sd-vae's network in bfloat16, 64 images of 256 px: encoded and decoded images/s."""
    shape, count, side, rounds = ("narrow", 2, 32, 2) if results.smoke else ("sd-vae", 64, 256, 15)
    options = {"backend": "eager"} if results.smoke else {}
    for direction, wanted in (("encode", ENCODED), ("decode", DECODED)):
        with attempt(results, direction):
            with taking("all"):
                how = (count, side, "bfloat16", results.device, rounds, shape)
                record = autoencoders.measured(direction, *how, **options)
            _vae_lines(results, record, wanted)
        gpu.release(results.device)


def _vae_lines(results: gpu.Results, record: dict, wanted: float) -> None:
    rates = {name: of["images_per_second"] for name, of in record["contenders"].items()}
    ours = {name: rate for name, rate in rates.items() if name in (FAST, FAST_COMPILED, autoencoders.TRITON)}
    for name, why in record["failed"].items():
        results.not_run(f"{record['title']}, {name}", why)
    for name, rate in rates.items():
        facts, title = record["contenders"][name], f"{record['title']}, {name}"
        right = facts["error"] <= record["largest_error"]
        results.add(title, rate, "images/s", wanted if name in ours else None, right=right, **facts)
    plain = [rates[name] for name in (DIFFUSERS, EAGER) if name in rates]
    if ours and plain:
        results.add(f"{record['title']}, best over eager", max(ours.values()) / max(plain), "x", OVER_PLAIN_VAE)


PARTS = {
    "latency": Part(latency, 560),
    "throughput": Part(throughput, 560),
    "error": Part(equal_error, 120),
    "vae": Part(vae, 330),
    "start": Part(gpu_starting.start, 240),
    "batches": Part(gpu_starting.recompilations, 120),
}


def main(arguments: list[str] | None = None) -> int:
    return gpu_parts.main("sampling", "benchmarks.gpu_sampling", PARTS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
