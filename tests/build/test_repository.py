"""Rules that every file of the repository keeps."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lfm_fast", "csrc", "tests", "benchmarks", "scripts", "docs", ".ci")
TEXT = {".py", ".sh", ".md", ".h", ".cpp", ".cu", ".cuh", ".txt", ".toml", ".in", ".json", ".cff", ""}
# a folder of one person's machine: it means nothing on another
MACHINE_PATH = re.compile(r"(?<![\w.$}~])/(?:" + "|".join(("work", "tmp", "root", "home", "Users", "mnt")) + r")/\w")


def text_files():
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a worktree's is a file
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in paths if path.suffix in TEXT and "__pycache__" not in path.parts]


def lines_matching(pattern, text):
    return [line for line in text.splitlines() if pattern.search(line)]


def test_no_file_names_a_folder_of_one_machine():
    found = {}
    for path in text_files():
        if lines := lines_matching(MACHINE_PATH, path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}


def test_a_machine_path_is_seen():
    folder = "/" + "home" + "/someone/data"
    assert lines_matching(MACHINE_PATH, f'path = "{folder}"\nurl = "https://example.org/home/page"\n') == [
        f'path = "{folder}"'
    ]


def test_files_stay_readable():
    """400 lines at most: a file is read in one sitting."""
    code = [path for path in text_files() if path.suffix in (".py", ".h", ".cpp", ".cu", ".sh")]
    long = {path.name: lines for path in code if (lines := len(path.read_text().splitlines())) > 400}
    assert long == {}
