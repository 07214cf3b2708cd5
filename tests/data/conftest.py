import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Every test of this area keeps its notes and drawings in one new folder, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
