"""The documentation is true: its snippets run, what it names exists, and docstrings' examples give what they say."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lfm_fast

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "CONTRIBUTING.md"]
PAGES = [*GUIDES, ROOT / "README.md"]
FOLDERS = ("lfm_fast", "csrc", "tests", "benchmarks", "scripts", "docs", ".ci")
MADE_BY_A_RECIPE = {"lfm_fast/ops/scale_samples.py", "csrc/cpu/scale_samples.cpp"}

# Runs the blocks it reads from standard input in one process, each with its own names, as they stand in order. A
# snippet may fail with any exception: its traceback is what the test of that snippet then fails with and shows.
RUNNER = """
import json, sys, traceback
report = {}
for title, code in json.load(sys.stdin):
    try:
        exec(compile(code, title, "exec"), {"__name__": "__main__"})
        report[title] = ""
    except Exception:
        report[title] = traceback.format_exc()
print("\\n" + json.dumps(report))
"""


def snippets():
    """(title, code) of every block marked ```python runnable; the title says where it stands."""
    found = []
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python runnable\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            heading = re.findall(r"^## (.*)", text[: block.start()], re.MULTILINE)[-1]
            line = text[: block.start()].count("\n") + 1
            found.append((f"{page.name}, line {line}: {heading}", block[1]))
    return found


def run_all(blocks, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LFM_FAST_CACHE": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(blocks), cwd=folder, env=environment, text=True, timeout=300,
        capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_all(snippets(), tmp_path_factory.mktemp("snippets"))


def test_there_are_snippets():
    assert len(snippets()) >= 8


@pytest.mark.parametrize("title", [title for title, _ in snippets()])
def test_snippet_runs(title, report):
    assert not report[title], report[title]


def test_a_snippet_that_fails_is_seen(tmp_path):
    answer = run_all([("good", "x = 1"), ("bad", "assert x == 1")], tmp_path)
    assert answer["good"] == ""
    assert "NameError" in answer["bad"]


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def in_backticks(text):
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose(text))]


def missing_paths(text):
    """Files and folders of the repository that a page mentions and that are not there."""
    mentioned = {word for word in in_backticks(text) if re.fullmatch(r"[\w./-]+", word)}
    paths = {word for word in mentioned if word.split("/")[0] in FOLDERS and "/" in word and "NAME" not in word}
    paths |= {word for word in mentioned if re.fullmatch(r"[\w-]+\.(txt|toml|md)|CMakeLists\.txt|setup\.py", word)}
    return sorted(path for path in paths - MADE_BY_A_RECIPE if not (ROOT / path).exists())


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_files_mentioned_exist(page):
    assert missing_paths(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", prose(page.read_text(encoding="utf-8")))
    own = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in own if not (page.parent / link).exists()] == []


def all_words():
    """Every identifier of the package, its kernels and its scripts."""
    files = [path for folder in ("lfm_fast", "csrc", "tests", "scripts") for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt")]
    code = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".sh", ".txt", ".toml")]
    return set(re.findall(r"\w+", "\n".join(p.read_text(encoding="utf-8") for p in code if p != Path(__file__))))


def unknown_names(text, words):
    """Dotted names of ours that cannot be imported, and identifiers that stand nowhere in the code."""
    unknown = []
    for word in in_backticks(text):
        word = re.sub(r"\(.*", "", word)
        if re.fullmatch(r"lfm_fast(\.\w+)+", word) or re.fullmatch(r"(ops|pictures)\.\w+", word):
            parts = word.removeprefix("lfm_fast.").split(".")
            unknown += [] if resolves(parts) else [word]
        elif re.fullmatch(r"[A-Za-z_]\w*", word) and re.search(r"_|[a-z][A-Z]|^[A-Z]", word) and word not in words:
            unknown.append(word)
    return unknown


def resolves(parts):
    value = lfm_fast
    for i, name in enumerate(parts):
        if not hasattr(value, name):
            try:
                value = importlib.import_module(".".join(["lfm_fast", *parts[: i + 1]]))
                continue
            except ImportError:
                return False
        value = getattr(value, name)
    return True


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_names_mentioned_exist(page):
    made = {"scale_samples", "NAME", "ROW", "_C_cuda"}
    assert unknown_names(page.read_text(encoding="utf-8"), all_words() | made) == []


def test_a_wrong_mention_is_seen():
    text = "`lfm_fast/no_such_file.py`, `lfm_fast.no_such_name`, `ops.no_such_op`, `NoSuch_" + "Class`, `ops.explain`"
    assert missing_paths(text) == ["lfm_fast/no_such_file.py"]
    found = unknown_names(text, all_words())
    assert found == ["lfm_fast.no_such_name", "ops.no_such_op", "NoSuch_Class"]


def modules_with_examples():
    names = (info.name for info in pkgutil.walk_packages([str(ROOT / "lfm_fast")], "lfm_fast."))
    sources = ((name, ROOT.joinpath(*name.split("."))) for name in names if "._C_" not in name)
    files = ((name, base / "__init__.py" if base.is_dir() else base.with_suffix(".py")) for name, base in sources)
    return sorted(name for name, file in files if ">>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "docs-cache"))
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "lfm_fast": lfm_fast})
    assert result.attempted > 0
    assert result.failed == 0
