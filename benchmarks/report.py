"""Draws result files: `python -m benchmarks.report RESULT.json ... [--markdown] [--output FOLDER]`.

With --output: FOLDER/benchmarks.md, a page of tables and pictures, and FOLDER/images/benchmark-*.png; what the README
may say of them is printed.
"""

import argparse
import json
from pathlib import Path

from benchmarks.names import (
    AGAIN,
    COMPILED,
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    EAGER,
    FAST,
    FAST_COMPILED,
    REFERENCE,
    at_equal_evaluations,
)

COLUMNS = ("contender", "median ms", "quartiles", "ratio", "GB/s (copy)", "GFLOP/s (GEMM)", "error", "peak MB", "")
CURVE = ("method", "told", "NFE", "median error", "90th percentile", "s")
IN_README = (REFERENCE, EAGER, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, FAST_COMPILED)
NETWORKS = ("forward", "unets", "train_step", "sampling")


def text(about: dict, records: list[dict], markdown: bool = False) -> str:
    """The whole report: the machine, how to read the table, and a table for each workload, by groups."""
    lines = [*machine(about), *LEGEND]
    parts = ["\n".join(f"- {line}" if markdown else line for line in lines)]
    for group in dict.fromkeys(record["group"] for record in records):
        parts.append(f"## {group}" if markdown else f"-- {group}")
        for record in (r for r in records if r["group"] == group):
            title, facts, rows = record["title"], "; ".join(_facts(record)), _rows(record)
            parts.append(
                f"**{title}**: {facts}\n{_markdown(rows).rstrip()}"
                if markdown
                else f"{title}: {facts}\n{_aligned(rows)}"
            )
    return "\n\n".join(parts)


LEGEND = (
    "Median of the rounds; ratio: a contender's time over the fast path's in the same round (median), so above 1 is "
    "slower than the fast path.",
    "noise: the quartiles of that ratio for a second run of the fast path; a ratio inside them is no difference.",
    "error: |result - float64| / |float64|, the worst tensor, of a training step of the gradient; for solvers against "
    "the true solution. Shares in brackets are of this machine's measured ceiling.",
)


def machine(about: dict) -> list[str]:
    ceiling = about["ceilings"]
    gemm = ", ".join(f"{flops / 1e9:.0f} {name}" for name, flops in ceiling["gemm_flops_per_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"mode {about['mode']}; {about['cores']} cores ({about['cpu_capability']}), {about['threads']} threads; "
        f"{versions}",
        f"ceilings measured here: copy {ceiling['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + written), "
        f"GEMM {gemm} GFLOP/s; caches up to {ceiling['cache_bytes'] / 2**20:.0f} MiB",
        f"load average {', '.join(f'{load:.1f}' for load in about['load_average'])}: above 0 before the run began, "
        "others were using the machine",
    ]


def _rows(record: dict) -> list[tuple[str, ...]]:
    if "points" in record:
        return [CURVE, *map(_point, record["points"])]
    return [COLUMNS, *(_row(name, c) for name, c in record["contenders"].items() if name != AGAIN)]


def _facts(record: dict):
    if "points" in record:  # no race
        yield record["note"]
        return
    noise, low, high = (record["noise"][key] for key in ("median", "low", "high"))
    load = record["load_average"][0]
    yield f"{record['rounds']} rounds, noise {noise:.3f} [{low:.3f} .. {high:.3f}], load {load:.1f}"
    if record["note"]:
        yield record["note"]
    yield from (f"not run: {name}: {why}" for name, why in record["not_run"].items())


def _row(name: str, contender: dict) -> tuple[str, ...]:
    seconds, ratio = contender["seconds"], contender["ratio"]["median"]
    digits = 3 if seconds["median"] < 0.1 else 1
    return (
        name,
        f"{seconds['median'] * 1e3:.{digits}f}",
        f"{seconds['low'] * 1e3:.{digits}f} .. {seconds['high'] * 1e3:.{digits}f}",
        f"{ratio:.2f}",
        _share(contender, "bytes_per_second", "share_of_copy"),
        _share(contender, "flops_per_second", "share_of_gemm"),
        f"{contender['error']:.1e}" if "error" in contender else "-",
        f"{contender['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in contender else "-",
        ", ".join(_extra(contender)),
    )


def _point(point: dict) -> tuple[str, ...]:
    """A way to solve (benchmarks.accuracy), with its error by sample."""
    errors = (f"{point[key]:.1e}" for key in ("error", "error_p90"))
    return (point["method"], point["setting"], f"{point['nfe']:.1f}", *errors, f"{point['seconds']:.2f}")


def _extra(contender: dict):
    if "nfe" in contender:
        yield f"NFE {contender['nfe']}"
    if "error_by_sample" in contender:
        yield f"by sample: median {contender['error_by_sample']:.1e}, p90 {contender['error_p90_by_sample']:.1e}"
    if "microseconds_per_evaluation" in contender:
        yield f"{contender['microseconds_per_evaluation']:.1f} us per evaluation"
    if "images_per_second" in contender:
        yield f"{contender['images_per_second']:.3g} images/s"
    if "share_of_step" in contender:
        yield f"{contender['share_of_step']:.2%} of a step"
    if "compile_seconds" in contender:
        yield f"compiled in {contender['compile_seconds']:.0f} s"
    if contender.get("how"):
        yield contender["how"]


def _share(contender: dict, rate: str, share: str) -> str:
    return f"{contender[rate] / 1e9:.3g} ({contender[share]:.0%})" if rate in contender else "-"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def readme(records: list[dict]) -> str:
    """A table for the README: each network workload's time, and how many times as long the others take."""
    found = [record for record in records if record["group"] in NETWORKS]
    names = [name for name in IN_README if any(name in record["contenders"] for record in found)]
    rows = [("", FAST, *names, "noise")]
    for record in found:
        contenders, noise = record["contenders"], record["noise"]
        ratios = [f"{_ratio(record, name):.2f} x" if name in contenders else "-" for name in names]
        milliseconds = f"{contenders[FAST]['seconds']['median'] * 1e3:.0f} ms"
        rows.append((record["title"], milliseconds, *ratios, f"{noise['low']:.2f} .. {noise['high']:.2f}"))
    return _markdown(rows) if found else ""


def _ratio(record: dict, name: str) -> float:
    return record["contenders"][name]["ratio"]["median"] * at_equal_evaluations(record, name)


def page(parts: list[tuple[dict, list[dict]]], pictures: dict[str, str]) -> str:
    """A page of documentation from the parts (about, records), one for each result file, and {picture: caption}."""
    lines = ["# Benchmarks", "", "Written by `lfm-fast bench`. How it is measured, and what follows from it:"]
    lines[-1] += " [performance.md](performance.md)."
    table = readme([record for _, records in parts for record in records])
    if table:
        lines += ["", "The fast path's time, and how many times as long the others take (at equal evaluations):", table]
    for picture, caption in pictures.items():
        lines += [f"![{caption}](images/{picture})", "", f"*{caption}*", ""]
    lines += [text(about, records, markdown=True) + "\n" for about, records in parts]
    return "\n".join(lines)


def read(path: Path) -> tuple[dict, list[dict]]:
    """(about the machine, records) of a result file. Raises ValueError for another file."""
    try:
        result = json.loads(path.read_text())
        about = result["machine_info"]["lfm_fast"]
        return about, [{"group": b["group"], **b["extra_info"]} for b in result["benchmarks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of these benchmarks ({type(error).__name__})") from error


def write(parts: list[tuple[dict, list[dict]]], output: Path) -> list[Path]:
    """The page and its pictures into `output`; returns what was written."""
    from benchmarks import plots

    (output / "images").mkdir(parents=True, exist_ok=True)
    records = [record for _, records in parts for record in records]
    pictures = plots.draw(records, output / "images")
    file = output / "benchmarks.md"
    file.write_text(page(parts, {path.name: caption for path, caption in pictures.items()}), encoding="utf-8")
    return [file, *pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--markdown", action="store_true", help="print tables in markdown")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write page and pictures there instead")
    arguments = parser.parse_args()
    try:
        parts = [read(path) for path in arguments.results]
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if arguments.output is None:
        print("\n\n".join(text(about, records, arguments.markdown) for about, records in parts))
        return
    for file in write(parts, arguments.output):
        print(f"wrote {file}")
    print(readme([record for _, records in parts for record in records]))


if __name__ == "__main__":
    main()
