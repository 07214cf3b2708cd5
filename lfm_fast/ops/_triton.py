"""The Triton backend of a row: its kernel's module is imported when it runs for the first time, never before."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

from lfm_fast.ops._registry import NEVER_ON_GPU, Backend


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors. Triton reads the variable when a kernel is
    defined, so it has to be set before the first one is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def triton_backend(row: str, why_not: Callable[..., str | None], shown_on_gpu: bool = False) -> Backend:
    """The backend of `row` whose kernel is `lfm_fast.kernels.triton.ROW.kernel`, called with the row's arguments.

    shown_on_gpu: a committed result shows the row passing on a GPU; until then it is opt-in.
    """

    def refuse(*args) -> str | None:
        if args[0].device.type == "cpu" and not interpreting():
            return "on CPU tensors it runs in Triton's interpreter alone (set TRITON_INTERPRET=1 before Python starts)"
        return why_not(*args)

    def run(*args):
        return importlib.import_module(f"lfm_fast.kernels.triton.{row}").kernel(*args)

    return Backend(
        name="triton",
        devices=("cuda", "cpu"),
        why_not=refuse,
        available=_installed,
        kernel=run,
        opt_in=None if shown_on_gpu else NEVER_ON_GPU,
    )
