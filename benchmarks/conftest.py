"""What a result file says about the machine, and the table at the end of a run."""

import os
from importlib import metadata

import pytest
import torch

from benchmarks import ceilings, measure, report, worker
from benchmarks.memory import keep_freed_memory
from benchmarks.names import GROUPS
from benchmarks.settings import MODE


@pytest.fixture(autouse=True, scope="session")
def _session(tmp_path_factory):
    """Compile afresh, so that the compile times mean something; measure the ceilings at both ends."""
    _kept.append(keep_freed_memory())
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    ceilings.measure()
    yield
    worker.close()
    measure.compare_with_ceilings()


PACKAGES = ("torch", "diffusers", "torchdiffeq", "pytest-benchmark")
_kept: list[bool] = []


def pytest_addoption(parser):
    parser.addoption("--group", action="append", choices=GROUPS, help="benchmarks of this group only (may be repeated)")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--group") or GROUPS
    kept = [item for item in items if _group(item) in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _group(item) -> str | None:
    marker = item.get_closest_marker("benchmark")
    return marker.kwargs["group"] if marker else None


def about() -> dict:
    return {
        "mode": MODE,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "freed_memory_is_kept": all(_kept),
        "load_average": list(os.getloadavg()),
        "ceilings": ceilings.measured(),
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]  # the machine's name is nobody's business
    machine_info["lfm_fast"] = about()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if measure.records:
        terminalreporter.section("lfm_fast benchmarks")
        terminalreporter.write_line(report.text(about(), measure.records))
