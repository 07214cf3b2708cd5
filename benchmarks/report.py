"""Draws a result file: `python -m benchmarks.report RESULT.json [--markdown] [--plot PICTURE.png]`."""

import argparse
import json
from pathlib import Path

from benchmarks.measure import AGAIN, COMPILED, FAST, REFERENCE

COLUMNS = ("contender", "median ms", "quartiles", "ratio", "GB/s (copy)", "GFLOP/s (GEMM)", "error", "peak MB", "")


def text(about: dict, records: list[dict], markdown: bool = False) -> str:
    """The whole report: the machine, how to read the table, and a table for each group."""
    parts = [_machine(about), _LEGEND]
    for group in dict.fromkeys(record["group"] for record in records):
        parts.append(f"## {group}" if markdown else f"-- {group}")
        for record in (r for r in records if r["group"] == group):
            parts.append(_heading(record))
            rows = [COLUMNS, *(_row(name, c) for name, c in record["contenders"].items() if name != AGAIN)]
            parts.append(_markdown(rows) if markdown else _aligned(rows))
    return "\n".join(parts)


_LEGEND = (
    "Median of the rounds; ratio: a contender's time over the fast path's in the same round (median), so above 1 is "
    "slower than the fast path.\nnoise: the quartiles of that ratio for a second run of the fast path itself; a ratio "
    "inside them is no difference.\nerror: |result - float64| / |float64|, the worst tensor; for solvers against the "
    "true solution. Shares in brackets are of this machine's measured ceiling."
)


def _machine(about: dict) -> str:
    ceiling = about["ceilings"]
    gemm = ", ".join(f"{flops / 1e9:.0f} {name}" for name, flops in ceiling["gemm_flops_per_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"mode {about['mode']}; {about['cores']} cores ({about['cpu_capability']}), {about['threads']} threads; "
        f"{versions}\n"
        f"ceilings measured here: copy {ceiling['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + written), "
        f"GEMM {gemm} GFLOP/s; caches up to {ceiling['cache_bytes'] / 2**20:.0f} MiB\n"
        f"load average {', '.join(f'{load:.1f}' for load in about['load_average'])}: above 0 before the run began, "
        "others were using the machine"
    )


def _heading(record: dict) -> str:
    noise, low, high = (record["noise"][key] for key in ("median", "low", "high"))
    heading = f"{record['title']}: {record['rounds']} rounds, noise {noise:.3f} [{low:.3f} .. {high:.3f}]"
    heading += f", load {record['load_average'][0]:.1f}" + (f"; {record['note']}" if record["note"] else "")
    return "\n" + heading + "".join(f"\n  not run: {name}: {why}" for name, why in record["not_run"].items())


def _row(name: str, contender: dict) -> tuple[str, ...]:
    seconds, ratio = contender["seconds"], contender["ratio"]["median"]
    digits = 3 if seconds["median"] < 0.1 else 1
    extra = []
    if "nfe" in contender:
        extra.append(f"NFE {contender['nfe']}")
    if "images_per_second" in contender:
        extra.append(f"{contender['images_per_second']:.3g} images/s")
    if "compile_seconds" in contender:
        extra.append(f"compiled in {contender['compile_seconds']:.0f} s")
    return (
        name,
        f"{seconds['median'] * 1e3:.{digits}f}",
        f"{seconds['low'] * 1e3:.{digits}f} .. {seconds['high'] * 1e3:.{digits}f}",
        f"{ratio:.2f}",
        _share(contender, "bytes_per_second", "share_of_copy"),
        _share(contender, "flops_per_second", "share_of_gemm"),
        f"{contender['error']:.1e}" if "error" in contender else "-",
        f"{contender['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in contender else "-",
        ", ".join(extra),
    )


def _share(contender: dict, rate: str, share: str) -> str:
    return f"{contender[rate] / 1e9:.3g} ({contender[share]:.0%})" if rate in contender else "-"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(COLUMNS))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["", lines[0], "|" + "---|" * len(COLUMNS), *lines[1:], ""])


def read(path: Path) -> tuple[dict, list[dict]]:
    """(about the machine, records) of a result file."""
    result = json.loads(path.read_text())
    return result["machine_info"]["lfm_fast"], [{"group": b["group"], **b["extra_info"]} for b in result["benchmarks"]]


def plot(records: list[dict], picture: Path) -> None:
    """One bar for each workload and contender: how many times as long as the fast path it takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(records) + 1.5), layout="constrained")
    colours = {REFERENCE: "tab:grey", COMPILED: "tab:orange"}
    for k, record in enumerate(records):
        low, high = record["noise"]["low"], record["noise"]["high"]
        axes.plot([low, high], [k, k], color="black", linewidth=6, alpha=0.3, label="noise" if k == 0 else None)
        for name, contender in record["contenders"].items():
            if name not in (FAST, AGAIN):
                ratio = contender["ratio"]["median"]
                kind = "torchdiffeq" if name.startswith("torchdiffeq") else name
                axes.plot(ratio, k, "o", color=colours.get(kind), label=kind)
                colours.setdefault(kind, axes.lines[-1].get_color())
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time over the fast path's time (right of 1: slower)")
    axes.set_yticks(range(len(records)), [record["title"] for record in records], fontsize=7)
    axes.invert_yaxis()
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), fontsize=7)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    arguments = parser.parse_args()
    about, records = read(arguments.result)
    print(text(about, records, arguments.markdown))
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()
