"""What importing the package costs and needs."""

import subprocess
import sys
from pathlib import Path

import pytest

import lfm_fast

ROOT = Path(__file__).resolve().parents[1]

# what no one should need in order to import the package or to touch any public name
OPTIONAL = ("triton", "xformers", "nvidia.dali", "diffusers", "lmdb", "webdataset", "gradio", "wandb", "tensorboard")

BLOCK = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {OPTIONAL!r}):
            raise ModuleNotFoundError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code):
    """Standard output of a fresh interpreter that runs code from the repository's root."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_alone_loads_nothing_beside_torch():
    """Whatever is installed; how long it takes is a benchmark of the group `startup`."""
    code = "import torch, sys; before = set(sys.modules); import lfm_fast; print(*(set(sys.modules) - before))"
    assert run(code).split() == ["lfm_fast"]


def test_public_names_need_no_optional_package():
    code = BLOCK + "import lfm_fast\nprint([type(getattr(lfm_fast, name)).__name__ for name in lfm_fast.__all__])"
    assert "module" in run(code)


def test_the_block_blocks():
    code = BLOCK + "try:\n    import diffusers\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert "blocked by this test" in run(code)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        lfm_fast.no_such_name  # noqa: B018
