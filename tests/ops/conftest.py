"""Fixtures of the op tests."""

import os

import pytest

from lfm_fast import _library, ops

REQUIRED = os.environ.get("LFM_FAST_REQUIRE_CPP") == "1"


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


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Every op on one backend: all of them on the reference, or all that can on the compiled library."""
    if request.param == "cpp":
        request.getfixturevalue("library")
    with ops.use_backend(request.param):
        yield request.param
