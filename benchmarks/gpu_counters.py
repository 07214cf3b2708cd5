"""What limits each kernel: hardware counters, read by Nsight Compute (ncu) where the driver lets it.

One program for each row, since ncu knows kernels by name alone: `python -m benchmarks.gpu_counters ROW NUMBER` runs the
row's first case of `gpu_shapes` in that number's order, its warm-up unwatched.
"""

import csv
import shutil
import subprocess
import sys

import torch

from benchmarks import gpu, gpu_shapes
from benchmarks.gpu import Results
from benchmarks.gpu_parts import attempt, grouped, until
from benchmarks.plain import forced
from benchmarks.workloads import OpWorkload
from lfm_fast.ops import _registry

DRAM, READ, WRITTEN = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
)
TIME, WARPS = "gpu__time_duration.sum", "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS, HITS = "launch__registers_per_thread", "lts__t_sector_hit_rate.pct"
METRICS = (DRAM, READ, WRITTEN, TIME, WARPS, REGISTERS, HITS)
# the card's clocks are left as they are: it is another's next
NCU = (
    "ncu",
    "--clock-control",
    "none",
    "--profile-from-start",
    "off",
    "--csv",
    "--page",
    "raw",
    "--print-units",
    "base",
)
SECONDS = 90.0  # of one program, ncu's replays of its kernels included


def watched(smoke: bool) -> list[tuple[str, int]]:
    """(row, number of its case), backward rows as well."""
    found, rows = [], _registry.rows()
    for number, case in enumerate(gpu_shapes.cases(smoke)):
        for row in (case.row, f"{case.row}_backward"):
            if row in rows and row not in (each for each, _ in found):
                found.append((row, number))
    return found


def counters(results: Results) -> None:
    """Share of the memory's peak, bytes, occupancy and registers of each row's kernels, as ncu counts them."""
    if shutil.which("ncu") is None:
        results.not_run("ncu", "it is not installed here")
        return
    for row, number in until(results, watched(results.smoke), reserve=SECONDS):
        program = (sys.executable, "-m", "benchmarks.gpu_counters", row, str(number))
        with attempt(results, row):
            try:
                out, err = said_by([*NCU, "--metrics", ",".join(METRICS), *program])
            except subprocess.TimeoutExpired:
                results.not_run(row, f"ncu took longer than {SECONDS:.0f} s")
                continue
            kernels = parsed(out)
            if not kernels:
                said = [line for line in (out + err).splitlines() if "==ERROR==" in line or "Error" in line]
                results.not_run(row, (said or ["ncu counted nothing"])[0].strip())
            for kernel in kernels:
                add_kernel(results, row, gpu_shapes.cases(results.smoke)[number], kernel)


def said_by(command: list[str]) -> tuple[str, str]:
    """Output and errors of ncu, which is ended together with the program that it watches."""
    with grouped(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        return process.communicate(timeout=SECONDS)


def add_kernel(results: Results, row: str, case: gpu_shapes.Case, kernel: dict) -> None:
    note = f"{kernel[TIME] / 1e3:,.0f} us, {kernel[READ] / 1e6:,.0f} MB read, {kernel[WRITTEN] / 1e6:,.0f} written, "
    note += f"{kernel[WARPS]:.0f} % of warps, {kernel[REGISTERS]:.0f} registers, {kernel[HITS]:.0f} % hits in L2"
    title = f"{row} {case.title}, {kernel['name'].partition('(')[0][:40]}"
    results.add(title, kernel[DRAM], "% of DRAM's peak", note=note, **kernel)


def parsed(text: str) -> list[dict]:
    """The kernels of ncu's raw page as CSV: a line of names, one of units, then one for each launch."""
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    for cells in list(csv.DictReader(lines[start:]))[1:]:
        if any(
            not cells.get(metric) for metric in METRICS
        ):  # a line of the program itself, or one it had no counter for
            continue
        found.append({"name": cells["Kernel Name"], **{m: float(cells[m].replace(",", "")) for m in METRICS}})
    return found


def once(row: str, number: int) -> None:
    """One call on the GPU between the profiler's start and stop."""
    workload = OpWorkload(row, {**gpu_shapes.cases(False)[number].size, "device": "cuda"})
    backend = workload.row.willing(next(workload.sets), forced=True)[0]
    with forced(backend):
        for _ in range(3):
            workload.call()
        gpu.wait(torch.device("cuda"))
        torch.cuda.cudart().cudaProfilerStart()
        workload.call()
        gpu.wait(torch.device("cuda"))
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    once(sys.argv[1], int(sys.argv[2]))
