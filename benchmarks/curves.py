"""Loss curves of the fast and the reference path: `python -m benchmarks.curves [--steps 200] [--output FOLDER]`.

Weights, data, noise, times and dropped labels are those of one seed, so the curves of all runs would be one but for
rounding, which training magnifies. How far it spreads them is measured between runs of the reference path that differ
in nothing but the order of sums: the batch at once, in 2 parts and in 3. The fast path is off by no more than they are.
"""

import argparse
import contextlib
import itertools
import json
from pathlib import Path

import torch

from lfm_fast import ops
from lfm_fast.checkpoint import atomic_write
from lfm_fast.distributed import World
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.schedule import learning_rate
from lfm_fast.train.source import open_source, resolve_labels
from lfm_fast.train.step import train_step

ROOT = Path(__file__).resolve().parents[1]
FAST, OTHER_SEED = "fast path", "reference path, another seed"
PARTS = {"reference path": 1, "reference path in 2 parts": 2, "reference path in 3 parts": 3}
FLOOR = 1e-8  # of the picture: a twelfth of a step between two float32 losses, which is no difference
MOST = 2.0  # times the spread; a chaotic difference has no more definite a size


def losses(config, source, reference: bool) -> list[float]:
    """The loss of every step."""
    world, found = World(device=torch.device(config.device)), []
    with ops.use_backend("reference") if reference else contextlib.nullcontext():
        state, path = build_state(config, source, world), training_path(config)
        for step in range(config.steps):
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(config, step, source.num_items)
            train_step(state, source, config, path, world)
            found.append(float(state.loss_sum))
            state.loss_sum.zero_()
    return found


def compare(settings: dict, source) -> dict:
    """Curves by name, and how far apart they are: `spread`, the largest root mean squared difference of two reference
    runs of one seed; `off`, the fast path's largest to any of them; `other_seed`, for the scale, that of two seeds."""

    def run(reference=True, **changes):
        config = resolve_labels(from_preset(**{**settings, **changes}), source.num_classes)
        return losses(config, source, reference)

    same = {name: run(accumulation_steps=parts) for name, parts in PARTS.items()}
    fast, other = run(reference=False), run(seed=settings.get("seed", 0) + 1)
    first = same["reference path"]
    return {
        "spread": max(difference(a, b) for a, b in itertools.combinations(same.values(), 2)),
        "off": max(difference(fast, curve) for curve in same.values()),
        "other_seed": difference(other, first),
        "curves": {**same, FAST: fast, OTHER_SEED: other},
    }


def difference(a, b) -> float:
    return (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).square().mean().sqrt().item()


def draw(found: dict, output: Path) -> None:
    """found: {precision: what `compare` gives}. Above the curves, below how far each is from the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(found), 5.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(found), sharex=True, squeeze=False)
    for (above, below), (precision, result) in zip(axes.T, found.items()):
        first = torch.tensor(result["curves"]["reference path"])
        for name, curve in result["curves"].items():
            style = _style(name)
            above.plot(range(1, len(curve) + 1), curve, label=name, **style)
            if name != "reference path":
                below.plot(
                    range(1, len(curve) + 1), (torch.tensor(curve) - first).abs().clamp(min=FLOOR), label=name, **style
                )
        above.set(title=precision, ylabel="loss")
        below.set(yscale="log", xlabel="step", ylabel="difference from the reference path")
        below.legend(frameon=False, fontsize=7)
        for axis in (above, below):
            axis.grid(True, alpha=0.25)
    with atomic_write(output) as temporary:
        figure.savefig(str(temporary), format="png")


def _style(name) -> dict:
    colours = {FAST: "#0072b2", OTHER_SEED: "#cccccc", "reference path": "#444444"}
    return {"color": colours.get(name, "#e69f00"), "linewidth": 1.6 if name == FAST else 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, default=ROOT, help="folder with benchmarks/results and docs/images")
    given = parser.parse_args()
    shared = {"preset": "embedded", "steps": given.steps, "batch_size": given.batch_size, "warmup_steps": 50}
    shared |= {"device": "cpu", "compile": "off"}
    source, _ = open_source(from_preset(**shared), World())
    found = {}
    for precision in given.precisions:
        found[precision] = compare({**shared, "precision": precision}, source)
        summary = {k: f"{v:.2e}" for k, v in found[precision].items() if k != "curves"}
        print(precision, summary, "final losses", {k: round(v[-1], 5) for k, v in found[precision]["curves"].items()})
    folders = [given.output / "benchmarks" / "results", given.output / "docs" / "images"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    draw(found, folders[1] / "training-curves.png")
    rounded = {
        precision: {**r, "curves": {k: [float(f"{x:.7g}") for x in v] for k, v in r["curves"].items()}}
        for precision, r in found.items()
    }
    record = {"settings": shared, "versions": {"torch": torch.__version__}, "found": rounded}
    with atomic_write(folders[0] / "training-curves.json") as temporary:
        Path(temporary).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
