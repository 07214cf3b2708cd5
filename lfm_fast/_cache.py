"""The user's cache folder: what can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """LFM_FAST_CACHE, else XDG_CACHE_HOME/lfm_fast, else ~/.cache/lfm_fast."""
    if os.environ.get("LFM_FAST_CACHE"):
        return Path(os.environ["LFM_FAST_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "lfm_fast"
    return Path.home() / ".cache" / "lfm_fast"
