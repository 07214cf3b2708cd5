"""Fixtures of the op tests."""

import os

import pytest
import torch

from lfm_fast import _library, ops

REQUIRED = os.environ.get("LFM_FAST_REQUIRE_CPP") == "1"
BACKENDS = ["reference", "cpp"]
if torch.cuda.is_available():
    BACKENDS += ["reference on cuda", "cuda", "triton"]


@pytest.fixture(scope="session")
def library():
    """The loaded compiled library. Without it a test skips, or fails where the run was told to have it."""
    reason = _library.load()
    if reason and REQUIRED:
        pytest.fail(f"LFM_FAST_REQUIRE_CPP=1, but {reason}")
    if reason:
        pytest.skip(reason)
    return _library


@pytest.fixture(scope="session")
def emulated():
    """The CUDA sources, compiled as loops over CPU tensors."""
    import emulated

    found = emulated.load()
    if isinstance(found, str) and REQUIRED:
        pytest.fail(f"LFM_FAST_REQUIRE_CPP=1, but {found}")
    if isinstance(found, str):
        pytest.skip(found)
    emulated.choose()
    return emulated


@pytest.fixture(scope="session")
def cuda_library():
    """The loaded CUDA library; where there is a GPU, it has to be there."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    reason = _library.load_cuda()
    assert reason is None, reason


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every op on one backend: all of them on the reference, or all that can on the compiled library or in Triton.

    Where there is a GPU, also the reference and the CUDA backends there: tensors made without a device are then on it,
    and so are those of `arguments_of`.
    """
    name = request.param.split()[0]
    if name == "cpp":
        request.getfixturevalue("library")
    if name == "cuda":
        request.getfixturevalue("cuda_library")
    values = request.node.callspec.params
    if name in ("cuda", "triton") and "row" in values and all(b.name != name for b in values["row"].backends):
        pytest.skip(f"{values['row'].name} has no backend {name!r}")
    torch.set_default_device(None if request.param in ("reference", "cpp") else "cuda")
    try:
        with ops.use_backend(name):
            yield name
    finally:
        torch.set_default_device(None)
