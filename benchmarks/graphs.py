"""What CUDA graphs save: `python -m benchmarks.graphs [--networks DiT-S/2 ...] [--output FILE.json]`.

A training step, and guided sampling by 25 Heun steps, with the host issuing every kernel and with graphs that are
replayed, in turns, one call each, round after round. A call ends when the device has done its work. The plain one runs
twice: the ratio of the two is the noise. On a CPU there are no graphs: what is left is the Sampler that keeps what no
batch decides, against lfm_fast.sample.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lfm_fast
from benchmarks.networks import LABEL_DROPOUT, LATENT_SHAPE, NUM_CLASSES, PRECISIONS, fill_zeros
from benchmarks.training import Latents
from lfm_fast import _graphs
from lfm_fast.checkpoint import atomic_write
from lfm_fast.distributed import World
from lfm_fast.train.config import TrainConfig
from lfm_fast.train.graphed import GraphedGradients
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.step import add_gradients_of_part, train_step

PLAIN, AGAIN, KEPT, GRAPH = "plain", "plain, again", "kept", "CUDA graph"
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of results; TF32 is not asked for
WARM_UP = 3  # calls: a graph is recorded in its first


def in_turns(contenders: dict[str, Callable], device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by contender."""
    seconds = {name: [] for name in contenders}
    for name in list(contenders) * WARM_UP:
        contenders[name]()
    for k in range(rounds):
        names = list(contenders)
        for name in names[k % len(names) :] + names[: k % len(names)]:
            _wait(device)
            start = time.perf_counter()
            contenders[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(network: str, batch_size: int, precision: str, how: str, device, rounds: int, source=None) -> dict:
    """A step of training, `how` as of `--compile`; the difference is that of the losses of all calls together."""
    world, source = World(device=device), source or Latents()
    settings = {"data": "memory", "model": network, "batch_size": batch_size, "steps": 10**6, "compile": how}
    settings |= {"num_classes": NUM_CLASSES, "label_dropout": LABEL_DROPOUT, "device": device.type}
    config = TrainConfig(**settings, precision=PRECISIONS[precision])
    path, states = training_path(config), {}
    for name in (PLAIN, AGAIN, GRAPH):
        states[name] = state = build_state(config, source, world)
        fill_zeros(state.model)
        if name == GRAPH:
            part = functools.partial(add_gradients_of_part, state, config, path, world)
            state.graph = GraphedGradients(part, state.trained, device)
    calls = {name: functools.partial(train_step, state, source, config, path, world) for name, state in states.items()}
    seconds = in_turns(calls, device, rounds)
    losses = {name: float(state.loss_sum) for name, state in states.items()}
    title = f"training step, {network}, {batch_size} images, {precision}, --compile {how}"
    return _record(title, precision, seconds, abs(losses[GRAPH] / losses[PLAIN] - 1))


@torch.no_grad()
def sampling(network: str, batch_size: int, precision: str, device, rounds: int, num_steps: int = 25) -> dict:
    """Guided sampling by Heun's method; the difference is that of the latents, of lfm_fast.sample's size."""
    if network == "embedded":
        flow = lfm_fast.LatentFlow.from_pretrained("embedded")
        model, shape = flow.model, flow.latent_shape
    else:
        torch.manual_seed(0)
        model, shape = (
            lfm_fast.create_model(network, num_classes=NUM_CLASSES, label_dropout=LABEL_DROPOUT),
            LATENT_SHAPE,
        )
        fill_zeros(model)
    model = model.eval().to(device, getattr(torch, precision))
    z1 = lfm_fast.noise(batch_size, shape, device=device)
    y = torch.arange(batch_size, device=device) % model.num_classes
    settings = {"null_label": model.null_label, "guidance_scale": 1.5, "method": "heun", "num_steps": num_steps}
    plain = functools.partial(lfm_fast.sample, model, z1, y=y, **settings)
    calls = {PLAIN: plain, KEPT: functools.partial(lfm_fast.Sampler(model, z1.shape, **settings), z1, y), AGAIN: plain}
    if _graphs.why_not(device) is None:
        calls[GRAPH] = functools.partial(lfm_fast.Sampler(model, z1.shape, cuda_graph=True, **settings), z1, y)
    expected = plain()
    differences = [(float((call() - expected).norm() / expected.norm())) for call in calls.values()]
    title = f"heun x {num_steps}, guided, {network}, {batch_size} images, {precision}"
    return _record(title, precision, in_turns(calls, device, rounds), max(differences))


def _record(title: str, precision: str, seconds: dict[str, list[float]], difference: float) -> dict:
    """Medians, and quartiles of the ratios to the plain call of the same round."""
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[PLAIN])]
        found[name] = {"seconds": statistics.median(times), "ratio": statistics.quantiles(ratios, n=4)}
    right = difference <= LARGEST_DIFFERENCE[precision]
    return {"title": title, "contenders": found, "difference": difference, "right": right}


def text(record: dict) -> str:
    lines = [f"{record['title']} (difference {record['difference']:.1e}{'' if record['right'] else ', WRONG'})"]
    for name, of in record["contenders"].items():
        low, middle, high = of["ratio"]
        lines.append(f"  {name:<14} {1e3 * of['seconds']:9.3f} ms   ratio {middle:.3f} ({low:.3f} .. {high:.3f})")
    return "\n".join(lines)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["embedded", "DiT-S/2", "DiT-XL/2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bfloat16")
    parser.add_argument("--compile", nargs="+", default=["off", "block"])
    parser.add_argument("--steps", type=int, default=25, help="of sampling")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    device, records = torch.device(given.device), []
    for network in given.networks:
        for batch in given.batches:
            runs = [functools.partial(sampling, network, batch, given.precision, device, given.rounds, given.steps)]
            if _graphs.why_not(device) is None and network != "embedded":
                arguments = (network, batch, given.precision)
                runs += [functools.partial(training, *arguments, how, device, given.rounds) for how in given.compile]
            for run in runs:
                records.append(run())
                print(text(records[-1]), flush=True)
    if given.output is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        about = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        with atomic_write(given.output) as temporary:
            Path(temporary).write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n")
    return 0 if all(record["right"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
