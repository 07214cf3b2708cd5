"""Which contender is fastest: measured once for a kind of call, remembered in the user's cache folder.

Measuring takes time and memory, waits for the device, and makes the choice, hence the last bits of a result, depend on
a clock. LFM_FAST_MEASURE says when it may happen:

- "auto" (the default): on CUDA only, in a run of one process, and not where PyTorch was asked for deterministic
  algorithms. Never on a CPU, whose cores others use too. Contenders that are opt-in take no part.
- "always": also on the CPU, in every process, and with the contenders that are opt-in.
- "never": what was remembered counts, and nothing is measured.

Whatever it says, nothing is measured while a graph is traced or captured, under a dispatch mode (a FLOP counter, say)
or on tensors that are not plain ones: there the remembered choice holds, or else the default.
"""

import functools
import json
import os
import secrets
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lfm_fast._cache import cache_folder

MODES = ("auto", "always", "never")
_REPEATS = 5
_known: dict[str, dict[str, dict]] = {}  # file -> key -> contender -> seconds, or the reason why there are none


def mode() -> str:
    asked = os.environ.get("LFM_FAST_MEASURE", "auto")
    if asked not in MODES:
        raise ValueError(f"LFM_FAST_MEASURE is {asked!r}, expected one of {', '.join(MODES)}.")
    return asked


def may_measure(tensors: tuple[Tensor, ...]) -> bool:
    """Whether this call is one that nobody minds to wait for."""
    asked, device = mode(), tensors[0].device
    if asked == "never" or (asked == "auto" and device.type != "cuda"):
        return False
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    if asked == "always":
        return True
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    alone = not ranks or torch.distributed.get_world_size() == 1
    return alone and not torch.are_deterministic_algorithms_enabled()


def remembered(table: str) -> dict[str, dict[str, float | str]]:
    """What was measured, by kind of call: seconds by contender, or why it has none."""
    path = _file(table, os.environ.get("LFM_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME"))
    if path not in _known:
        _known[path] = _from_disk(path)
    return _known[path]


def measure(table: str, key: str, contenders: dict[str, Callable], device: torch.device) -> dict[str, float | str]:
    """Time every contender, remember and return what came of it. A contender that raises is out, with its reason."""
    found: dict[str, float | str] = {}
    for name, run in contenders.items():
        try:
            found[name] = _seconds(run, device)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError too
            found[name] = f"it failed when it was measured ({str(error).splitlines()[0].rstrip('.')})"
    rows = remembered(table)
    rows[key] = found
    _write(str(cache_folder() / f"{table}.json"), rows)
    return found


def bucket(size) -> int | None:
    """The next power of two; of a size that a graph holds open, the one it was traced with, without a guard on it."""
    if not isinstance(size, int):
        size = size.node.hint
    return None if size is None else 1 << max(size - 1, 0).bit_length()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


def _seconds(run: Callable, device: torch.device) -> float:
    run()
    return min((_on_cuda if device.type == "cuda" else _on_cpu)(run) for _ in range(_REPEATS))


def _on_cpu(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_cuda(run: Callable, calls: int = 3) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls / 1e3


@functools.lru_cache(maxsize=16)
def _file(table: str, *variables: str | None) -> str:
    """Asked at every call of a row: cached for the environment variables that decide it."""
    return str(cache_folder() / f"{table}.json")


def _from_disk(path: str) -> dict[str, dict]:
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (OSError, ValueError):  # a table may always be lost
        return {}
    return {key: row for key, row in table.items() if _is_row(row)} if isinstance(table, dict) else {}


def _is_row(row) -> bool:
    return isinstance(row, dict) and all(isinstance(value, (str, float)) for value in row.values())


def _write(path: str, rows: dict[str, dict]) -> None:
    """Another process may write too: its rows are read again first, and the file is replaced whole."""
    rows |= {key: row for key, row in _from_disk(path).items() if key not in rows}
    temporary = f"{path}.{os.getpid()}~{secrets.token_hex(4)}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
        os.replace(temporary, path)
    except OSError:  # then it is measured again in the next process
        if os.path.exists(temporary):
            os.unlink(temporary)
