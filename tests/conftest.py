"""What holds for every test."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Notes, drawings and measured choices go to a new folder of this run, one for all of its workers: what is in the
    user's neither changes a test nor is changed. Nor does a clock choose a backend because their shell says so."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFM_FAST_CACHE", str(folder / "lfm-fast-cache"))
        patch.delenv("LFM_FAST_MEASURE", raising=False)
        yield
