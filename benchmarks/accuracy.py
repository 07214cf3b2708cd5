"""Error over evaluations: what each method makes of a number of evaluations, sample by sample.

Not a race, so a record of it has no contenders but `points`: a method with its steps or tolerance, its evaluations, and
the median and 90th percentile over the samples of |z - z*| / |z*|, z* being the solution in float64.
"""

import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import lfm_fast
from benchmarks import measure
from benchmarks.names import ADAPTIVE, FIXED
from benchmarks.settings import QUICK
from benchmarks.solving import SCALE, errors, field, spread, start

EVALUATIONS = (8, 24) if QUICK else (8, 12, 18, 27, 40, 60)
TOLERANCES = (1e-2,) if QUICK else (1e-2, 1e-3, 1e-4, 1e-5)
HEUN, MULTISTEP = (30, 40, 60, 90, 120), (20, 30, 40, 60)  # evaluations, to read half of Heun's off at small errors
GRIDS = ("uniform", ("shift", 2.0), ("shift", 3.0), "quadratic", "karras", "logit")
REUSED, THRESHOLDS = 60, (0.1,) if QUICK else (0.2, 0.1, 0.05, 0.02)  # steps of ab2, and what it may miss


@dataclass(frozen=True)
class Point:
    """One way to solve: a line of a picture, what it is told, and the arguments of sample."""

    method: str
    setting: str
    arguments: dict


def points() -> list[Point]:
    """All methods with as many steps as evaluations allow, all tolerances, and reuse of velocities."""
    found = [point for name in FIXED for point in _fixed(name, EVALUATIONS)]
    found += _fixed("abm5", EVALUATIONS, time_grid="logit")
    for name in (*ADAPTIVE, "torchdiffeq:dopri5"):
        tolerances = TOLERANCES[:2] if name == "adaptive_heun" else TOLERANCES  # 1e-5 asks it for 700 evaluations
        found += [Point(name, f"{tol:g}", {"method": name, "atol": tol, "rtol": tol}) for tol in tolerances]
    for threshold in THRESHOLDS:
        reuse = lfm_fast.approximations.Reuse(SCALE, threshold)
        settings = {"method": "ab2", "num_steps": REUSED, "guidance": reuse}
        found.append(Point(f"ab2 x {REUSED}, reuse", f"{threshold:g}", settings))
    return found


def against_heun() -> list[Point]:
    """Methods of one evaluation a step beside Heun, whose curve goes as far as twice their evaluations."""
    found = [point for name in ("ab3", "unipc", "abm5") for point in _fixed(name, MULTISTEP)]
    return _fixed("heun", HEUN) + found + _fixed("abm5", MULTISTEP, time_grid="logit")


def _fixed(name: str, allowed: tuple[int, ...], **more) -> list[Point]:
    """A method with as many steps as these numbers of evaluations allow."""
    evaluations, words = lfm_fast.solvers.get_solver(name).evaluations, ", ".join([name, *map(str, more.values())])
    steps = {max(n for n in range(1, most + 1) if evaluations(n) <= most or n == 1) for most in allowed}
    return [Point(words, f"x {n}", {"method": name, "num_steps": n, **more}) for n in sorted(steps)]


def grids(num_steps: int) -> list[Point]:
    """Heun's steps over the time grids that have names."""
    settings = {"method": "heun", "num_steps": num_steps}
    names = [grid if isinstance(grid, str) else f"{grid[0]} {grid[1]:g}" for grid in GRIDS]
    return [Point(name, f"heun x {num_steps}", {**settings, "time_grid": grid}) for name, grid in zip(names, GRIDS)]


def solve(point: Point, field_name: str, truth: Tensor) -> dict:
    """A point of the record."""
    model, null_label, _ = field(field_name, torch.float32)
    z_1, y = start(field_name, len(truth))
    settings = {"y": y, "null_label": null_label, "guidance_scale": SCALE, **point.arguments}
    if "guidance" in settings:
        del settings["guidance_scale"]
    began = time.perf_counter()
    z_0, stats = lfm_fast.sample(model, z_1, return_stats=True, **settings)
    seconds = time.perf_counter() - began
    # what the network was evaluated for: both labels are two rows, and of those that are reused none is computed
    nfe = (
        float(stats.forwards.double().mean()) / 2 if "guidance" in point.arguments else float(stats.nfe.double().mean())
    )
    found = errors(z_0, truth)
    return {"method": point.method, "setting": point.setting, "nfe": nfe, "seconds": seconds, **spread(found)}


def sweep(benchmark, title: str, chosen: list[Point], field_name: str, truth: Tensor, note: str) -> None:
    """Solve in all these ways, once each, and record it; truth (B, ...): the solution of the first B samples."""
    load = os.getloadavg()[0]
    found = []

    def call():
        found.extend(solve(point, field_name, truth) for point in chosen)

    benchmark.pedantic(call, rounds=1, iterations=1)
    record = {
        "title": title,
        "precision": "float32",
        "images": len(truth),
        "note": f"{len(truth)} samples, guided by {SCALE:g}; {note}",
        "load_average": [load, os.getloadavg()[0]],
        "contenders": {},
        "points": found,
    }
    benchmark.extra_info.update(record)
    measure.records.append({"group": benchmark.group, **record})
    check(record)


def check(record: dict) -> None:
    """Fail where a method does not come nearer to the solution: it solves something else."""
    for method in dict.fromkeys(point["method"] for point in record["points"]):
        mine = [point for point in record["points"] if point["method"] == method]
        best = min(point["error"] for point in mine)
        assert best < 0.5, f"{record['title']}: {method} is off by {best:.1e}, whatever it is told"


def evaluations_at(points: list[dict], method: str, error: float, key: str = "error") -> float | None:
    """The evaluations at which a method's curve, straight between its points in logarithms, passes an error."""
    mine = sorted((p for p in points if p["method"] == method), key=lambda p: p["nfe"])
    for before, after in pairwise(mine):
        if before[key] >= error >= after[key] and before[key] > after[key]:
            share = math.log(before[key] / error) / math.log(before[key] / after[key])
            return before["nfe"] * (after["nfe"] / before["nfe"]) ** share
    return None
