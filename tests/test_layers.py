"""Imports inside the package point down only."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

import lfm_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lfm_fast"

# from the top down; a module may import from rows below its own
ROWS = (
    {"cli"},
    {"pipeline", "train", "tuning", "approximations", "interop"},
    {"tasks"},
    {"metrics"},
    {"sampler", "sampling", "likelihood", "data", "pictures"},
    {"solvers", "guidance", "flow", "autoencoder", "models", "checkpoint"},
    {"ops"},
    {"kernels", "_cache", "_graphs", "_library", "_terminal", "distributed"},
)
WITHIN_A_ROW = {
    ("pipeline", "interop"),
    ("train", "pipeline"),
    ("sampler", "sampling"),
    ("guidance", "flow"),
    ("checkpoint", "models"),
    ("autoencoder", "models"),
}
ABOVE_ALL = ("train_fast", "scripts", "tests", "benchmarks")
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}


def imported_modules(tree, package):
    """Dotted names a module imports, wherever the statement stands; package is the importing file's own package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lfm_fast":
            yield f"lfm_fast.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def part_of(name):
    """The part of the house a dotted name belongs to ("ops", "train", ...), or None when it is none of ours."""
    top, _, rest = name.partition(".")
    if top in ABOVE_ALL:
        return top
    if top != "lfm_fast" or not rest:
        return None
    first = rest.split(".")[0]
    if first in lfm_fast._EXPORTS:  # a public name: what counts is the module that defines it
        return lfm_fast._EXPORTS[first].split(".")[1]
    if first in lfm_fast._MODULES:
        return lfm_fast._MODULES[first].split(".")[1]
    return None if first.startswith("__") else first


def complaints(source, filename, part, package):
    """Sentences about imports of one file that point up or sideways."""
    found = []
    for name in imported_modules(ast.parse(source, filename), package):
        other = part_of(name)
        if other is None or other == part:
            continue
        if other in ABOVE_ALL:
            found.append(f"{filename} imports {name}, which stands above the package")
        elif other not in RANK:
            found.append(f"{filename} imports {name}: '{other}' has no place in ROWS")
        elif RANK[other] <= RANK[part] and (part, other) not in WITHIN_A_ROW:
            found.append(f"{filename} ({part}) imports {name} ({other}): not below it")
    return found


def package_files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    part = parts[1]
    assert part in RANK, f"{path.name}: '{part}' has no place in ROWS"
    package = ".".join(parts[:-1])  # of lfm_fast/flow/paths.py and of lfm_fast/flow/__init__.py: lfm_fast.flow
    assert complaints(path.read_text(), path.relative_to(ROOT).as_posix(), part, package) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("flow", "from lfm_fast.train import step"),
        ("flow", "import lfm_fast.sampling"),
        ("flow", "def f():\n    from ..pipeline import LatentFlow"),
        ("ops", "from lfm_fast import sample"),
        ("ops", "import lfm_fast\nlfm_fast.create_model('DiT-S/2')"),
        ("solvers", "from importlib import import_module\nimport_module('lfm_fast.guidance')"),
        ("models", "from lfm_fast import checkpoint"),
        ("metrics", "from lfm_fast.train import loop"),
        ("data", "from lfm_fast.somewhere_new import thing"),
        ("data", "import tests.helpers"),
    ],
)
def test_an_import_that_points_up_is_seen(part, source):
    assert len(complaints(source, "example.py", part, f"lfm_fast.{part}")) == 1


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("train", "from lfm_fast import metrics, flow_matching_loss, __version__"),
        ("checkpoint", "from lfm_fast.models import from_config"),
        ("guidance", "from .flow import paths"),
        ("flow", "from . import paths\nfrom .noise import normal\nfrom lfm_fast import ops"),
        ("ops", "import torch\nfrom lfm_fast import _library"),
    ],
)
def test_an_import_that_points_down_passes(part, source):
    package = "lfm_fast" if part in ("checkpoint", "guidance") else f"lfm_fast.{part}"
    assert complaints(source, "example.py", part, package) == []


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest passes some names of folders by, "build" among them unless it is told otherwise."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert "build" in folders
    assert not [name for name in folders for pattern in patterns if fnmatch(name, pattern)]
