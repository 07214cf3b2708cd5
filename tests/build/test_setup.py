"""setup.py: what it may import, what it says when it cannot compile, what the wheel is called."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, without its setup() having run."""
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    for name in ("LFM_FAST_BUILD", "LFM_FAST_CUDA", "LFM_FAST_TORCH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_torch(folder, version, cuda=None):
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    return folder


def test_never_imports_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"setuptools"}


@pytest.mark.parametrize(
    ("version", "usable"), [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True)]
)
def test_torch_from_2_10_on_is_found(setup_py, monkeypatch, tmp_path, version, usable):
    folder = fake_torch(tmp_path / "torch", version)
    monkeypatch.setenv("LFM_FAST_TORCH", str(folder))
    assert setup_py["find_torch"]() == (folder if usable else None)


def test_each_missing_thing_is_named(setup_py, monkeypatch, tmp_path):
    why = setup_py["why_no_library"]
    monkeypatch.setenv("LFM_FAST_TORCH", str(fake_torch(tmp_path / "torch", "2.13.0")))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler" in why()
    assert "no-such-compiler" in why()
    monkeypatch.setenv("LFM_FAST_TORCH", str(tmp_path / "empty"))
    assert "no torch 2.10 or newer" in why()
    monkeypatch.setenv("LFM_FAST_BUILD", "off")
    assert "LFM_FAST_BUILD=off" in why()


def test_an_activated_environment_is_searched(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert tmp_path / "lib" / version / "site-packages" / "torch" in setup_py["torch_candidates"]()


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("cuda: Optional[str] = '13.0'", True),
        ("cuda = '12.8'", True),
        ("cuda: Optional[str] = None", False),
        ("", False),
    ],
)
def test_whether_a_torch_has_cuda(setup_py, tmp_path, line, has):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = '6.1'\n")
    assert setup_py["torch_has_cuda"](tmp_path) is has


def test_the_cuda_library_is_compiled_where_it_can_serve(setup_py, monkeypatch, tmp_path):
    """With nvcc, but a torch without CUDA, nobody waits for it who has not asked."""
    why = setup_py["why_no_cuda"]
    nvcc = {"here": None}
    monkeypatch.setitem(why.__globals__, "find_nvcc", lambda: nvcc["here"])
    monkeypatch.setenv("LFM_FAST_TORCH", str(fake_torch(tmp_path / "with", "2.13.0", cuda="13.0")))
    assert "nvcc was not found" in why()
    nvcc["here"] = "nvcc"
    assert why() is None
    monkeypatch.setenv("LFM_FAST_CUDA", "off")
    assert why() == "LFM_FAST_CUDA=off was set"
    monkeypatch.setenv("LFM_FAST_CUDA", "auto")
    monkeypatch.setenv("LFM_FAST_TORCH", str(fake_torch(tmp_path / "without", "2.13.0")))
    assert "has no CUDA" in why()
    monkeypatch.setenv("LFM_FAST_CUDA", "on")
    assert why() is None
    nvcc["here"] = None
    with pytest.raises(SystemExit, match="LFM_FAST_CUDA=on, but there is no nvcc"):
        why()
    monkeypatch.setenv("LFM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="LFM_FAST_CUDA is yes, expected auto, on or off"):
        why()


def wheel_tag(**environment):
    code = (
        "from distutils.core import run_setup\n"
        "distribution = run_setup('setup.py', ['-q'], stop_after='commandline')\n"
        "command = distribution.get_command_obj('bdist_wheel')\n"
        "command.ensure_finalized()\n"
        "print('-'.join(command.get_tag()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", "import setuptools\n" + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


def test_wheel_tags(tmp_path):
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    torch = fake_torch(tmp_path / "torch", "2.13.0")
    can = {"CXX": str(compiler), "LFM_FAST_TORCH": str(torch), "LFM_FAST_BUILD": "auto"}
    assert wheel_tag(**can).startswith("cp310-abi3-")
    assert wheel_tag(LFM_FAST_BUILD="off") == "py3-none-any"


def test_a_build_without_a_compiler_leaves_its_reason(tmp_path):
    package = tmp_path / "lib" / "lfm_fast"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "LFM_FAST_BUILD": "auto", "CXX": str(tmp_path / "none")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("installing without the compiled library") == 1
    assert "no C++ compiler" in json.loads((package / "_C_build.json").read_text())["reason"]
    assert not (package / "_C_cpu.so").exists()
    refused = subprocess.run(command, cwd=ROOT, env={**environment, "LFM_FAST_BUILD": "require"}, capture_output=True)
    assert refused.returncode != 0
