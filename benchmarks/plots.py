"""Pictures of result files: throughput, latency, where the time goes, how much of the machine's ceiling is reached."""

from pathlib import Path

import matplotlib

from benchmarks.names import (
    ADAPTIVE,
    AGAIN,
    COMPILED,
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    EAGER,
    FAST,
    FAST_COMPILED,
    FIXED,
    REFERENCE,
    at_equal_evaluations,
)

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    FAST: "#0072b2",
    FAST_COMPILED: "#56b4e9",
    REFERENCE: "#999999",
    EAGER: "#e69f00",
    COMPILED: "#d55e00",
    DIFFUSERS: "#cc79a7",
    DIFFUSERS_COMPILED: "#882255",
}
OTHER_COLOUR = "#009e73"
HALF = ("bfloat16",)
_FEW = 10  # points that make a table, and no picture
_DARK = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#882255", "#999999")
_FAMILIES = {
    "fixed": ("-", "o", _DARK),
    "adaptive": ("--", "s", _DARK),
    "other": (":", "^", ("#000000", "#777777", "#aa4499")),
}


def draw(records: list[dict], folder: Path) -> dict[Path, str]:
    """Every picture for which there are records, as benchmark-NAME.png: {file: what it shows}."""
    written = {}
    for name, plot in PICTURES.items():
        figure = plot(records)
        if figure is not None:
            figure.savefig(folder / f"benchmark-{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            written[folder / f"benchmark-{name}.png"] = plot.__doc__
    return written


def throughput(records):
    """Images per second: of a forward over the batch, a training step, guided sampling at equal evaluations."""
    found = [r for r in _of(records, "forward", "train_step", "sampling") if r["precision"] in HALF] or _of(
        records, "forward", "train_step", "sampling"
    )
    groups = [group for group in ("forward", "train_step", "sampling") if _of(found, group)]
    if not groups:
        return None
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.6 * len(groups), 3.8), layout="constrained", squeeze=False
    )
    for axis, group in zip(axes[0], groups):
        here = _of(found, group)
        if group == "forward" and len({r["images"] for r in here}) > 1:
            _lines(axis, sorted(here, key=lambda r: r["images"]))
        else:
            _bars(axis, here[0], "images_per_second")
        axis.set_ylabel("images per second")
        axis.set_title(here[0]["title"] if len(here) == 1 or group != "forward" else f"forward, {here[0]['precision']}")
        axis.title.set_size(9)
    return figure


def _lines(axis, records):
    for name in _names(records):
        points = [(r["images"], r["contenders"][name]["images_per_second"]) for r in records if name in r["contenders"]]
        axis.plot(*zip(*points), "o-", color=_colour(name), label=name, markersize=4)
    axis.set(xscale="log", xlabel="batch", ylim=(0, None))
    batches = sorted({r["images"] for r in records})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.legend(fontsize=7)


def _bars(axis, record, key):
    names = [name for name in _names([record]) if key in record["contenders"][name]]
    values = [record["contenders"][name][key] / at_equal_evaluations(record, name) for name in names]
    bars = axis.bar(range(len(names)), values, color=[_colour(name) for name in names])
    axis.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8)
    axis.set_xticks(
        range(len(names)), [name.replace(" + ", " +\n") for name in names], rotation=40, fontsize=7, ha="right"
    )
    axis.margins(y=0.12)


def latency(records):
    """Milliseconds of one call, median and quartiles: the smallest forward, a training step, guided sampling."""
    chosen = []
    for group in ("forward", "train_step", "sampling"):
        here = [r for r in _of(records, group) if r["precision"] in HALF] or _of(records, group)
        chosen += sorted(here, key=lambda r: r["images"])[:1]
    if not chosen:
        return None
    figure, axes = pyplot.subplots(1, len(chosen), figsize=(4.6 * len(chosen), 3), layout="constrained", squeeze=False)
    for axis, record in zip(axes[0], chosen):
        for k, name in enumerate(names := _names([record])):
            seconds = record["contenders"][name]["seconds"]
            low, middle, high = (1e3 * seconds[key] for key in ("low", "median", "high"))
            axis.errorbar(middle, k, xerr=[[middle - low], [high - middle]], fmt="o", color=_colour(name), capsize=3)
            axis.annotate(
                _digits(middle),
                (middle, k),
                xytext=(0, 5),
                textcoords="offset points",
                fontsize=7,
                ha="center",
            )
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15, y=0.15)
        axis.set(xlim=(0, None), xlabel="ms, median and quartiles")
        axis.set_title(record["title"], fontsize=9)
    return figure


def shares(records):
    """Which operators a forward and a training step spend their time in."""
    rows = []
    for record in _of(records, "forward", "train_step"):
        rows += [(record, name, c["shares"]) for name, c in record["contenders"].items() if c.get("shares")]
    batch = max((record["images"] for record, *_ in rows if record["group"] == "train_step"), default=None)
    rows = [row for row in rows if batch is None or row[0]["images"] == batch]
    if not rows:
        return None
    operators = _by_weight(rows)
    colours = {**dict(zip(operators, pyplot.get_cmap("tab20").colors)), "other": "#dddddd"}
    figure, axis = pyplot.subplots(figsize=(11, 0.55 * len(rows) + 2.4), layout="constrained")
    for k, (_, _, found) in enumerate(rows):
        found = {operator: share for operator, share in found.items() if operator in operators}
        found["other"] = 1 - sum(share for operator, share in found.items() if operator != "other")
        left = 0.0
        for operator in [*(o for o in operators if o in found and o != "other"), "other"]:
            axis.barh(k, found.get(operator, 0), left=left, color=colours[operator], edgecolor="white")
            if found.get(operator, 0) > 0.05:
                axis.text(left + found[operator] / 2, k, f"{found[operator]:.0%}", ha="center", va="center", fontsize=7)
            left += found.get(operator, 0)
    axis.set_yticks(range(len(rows)), [f"{record['title']}\n{name}" for record, name, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="share of the time, by PyTorch's profiler", xlim=(0, 1))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[o]) for o in operators]
    names = [operator.removeprefix("lfm_fast_cpp::").removeprefix("aten::") for operator in operators]
    figure.legend(handles, names, fontsize=7, ncols=5, loc="outside lower center")
    return figure


def _by_weight(rows) -> list[str]:
    total = {}
    for *_, found in rows:
        for operator, share in found.items():
            total[operator] = total.get(operator, 0) + share
    named = sorted((operator for operator in total if operator != "other"), key=total.get, reverse=True)
    return [*named[:19], "other"]


def ceilings(records):
    """How much of what this machine can do at best: bytes moved by ops, multiply-adds of networks."""
    ops = [(r, "share_of_copy") for r in _of(records, "ops")]
    networks = [(r, "share_of_gemm") for r in _of(records, "forward", "train_step", "sampling")]
    panels = [(rows, words) for rows, words in ((ops, "copying memory"), (networks, "matrix products")) if rows]
    panels = [([(r, key) for r, key in rows if key in r["contenders"][FAST]], words) for rows, words in panels]
    panels = [(rows, words) for rows, words in panels if rows]
    if not panels:
        return None
    heights = [max(len(rows), 3) for rows, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.26 * sum(heights) + 2), layout="constrained", height_ratios=heights, squeeze=False
    )
    for axis, (rows, words) in zip(axes[:, 0], panels):
        for k, (record, key) in enumerate(rows):
            for name in _names([record]):
                if key in record["contenders"][name]:
                    mark = "D" if name == FAST else "o"
                    axis.plot(record["contenders"][name][key], k, mark, color=_colour(name), label=name, markersize=5)
        axis.set_yticks(range(len(rows)), [record["title"] for record, _ in rows], fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.set(xlim=(0, None), ylim=(len(rows) - 0.5, -0.5), xlabel=f"share of the measured ceiling of {words}")
    _legend(figure, axes[:, 0])
    return figure


def solvers(records):
    """Error over evaluations, |z - z*| / |z*| by sample: the median, and the 90th percentile."""
    found = [record for record in records if len(record.get("points", ())) > _FEW]
    if not found:
        return None
    figure, axes = pyplot.subplots(len(found), 2, figsize=(13, 6.2 * len(found)), layout="constrained", squeeze=False)
    for row, record in zip(axes, found):
        for axis, key, words in zip(row, ("error", "error_p90"), ("median", "90th percentile")):
            _curves(axis, record["points"], key)
            name = record["title"].partition(",")[0]
            axis.set_title(f"{name}: {words} of {record['images']} samples", fontsize=10)
    _legend(figure, axes.flat)
    return figure


def _curves(axis, points, key):
    """One line for each method: fixed steps solid, adaptive ones dashed, others dotted."""
    used = dict.fromkeys(_FAMILIES, 0)
    for method in dict.fromkeys(point["method"] for point in points):
        family = "fixed" if method in FIXED else "adaptive" if method in ADAPTIVE else "other"
        style, marker, colours = _FAMILIES[family]
        mine = sorted((p for p in points if p["method"] == method), key=lambda p: p["nfe"])
        known = {"color": colours[used[family] % len(colours)], "linestyle": style, "marker": marker}
        axis.plot([p["nfe"] for p in mine], [p[key] for p in mine], markersize=4.5, label=method, **known)
        used[family] += 1
    axis.set(xscale="log", yscale="log", xlabel="evaluations (mean over the samples)", ylabel="relative error")
    nfe = [point["nfe"] for point in points]
    ticks = [n for n in (4, 8, 12, 20, 30, 50, 80, 120, 200, 400) if 0.9 * min(nfe) <= n <= 1.1 * max(nfe)]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def ratios(records):
    """How many times as long as the fast path each contender takes at equal evaluations, and the noise."""
    records = [record for record in records if record["contenders"]]
    if not records:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.27 * len(records) + 1.5), layout="constrained")
    for k, record in enumerate(records):
        low, high = record["noise"]["low"], record["noise"]["high"]
        axes.plot([low, high], [k, k], color="black", linewidth=6, alpha=0.3, label="noise" if k == 0 else None)
        for name in _names([record]):
            if name != FAST:
                ratio = record["contenders"][name]["ratio"]["median"] * at_equal_evaluations(record, name)
                axes.plot(ratio, k, "o", color=_colour(name), label=_kind(name))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set(xscale="log", xlabel="time over the fast path's time (right of 1: slower)")
    axes.set_yticks(range(len(records)), [record["title"] for record in records], fontsize=7)
    axes.set_ylim(len(records) - 0.5, -0.5)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _legend(figure, [axes])
    return figure


PICTURES = {f.__name__: f for f in (throughput, latency, shares, ceilings, solvers, ratios)}


def _of(records, *groups):
    return [record for record in records if record["group"] in groups]


def _names(records) -> list[str]:
    """Contenders, the known ones first and in one order; without the second run of the fast path."""
    found = list(dict.fromkeys(name for record in records for name in record["contenders"] if name != AGAIN))
    known = list(COLOURS)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def _kind(name: str) -> str:
    return name if name in COLOURS else "what else does it"


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER_COLOUR)


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _legend(figure, axes) -> None:
    """One for all, above; each name once."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), fontsize=7, ncols=4, loc="outside upper center")
