"""Notes and pictures in the user's cache folder that save work done before."""

import hashlib
import json
import os
from pathlib import Path

from lfm_fast._cache import cache_folder
from lfm_fast.checkpoint import atomic_write


def read_note(kind: str, subject) -> dict:
    """What an earlier run noted about `subject` (a path), or an empty dict: a note may always be lost."""
    try:
        note = json.loads(_note_path(kind, subject).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(kind: str, subject, note: dict) -> None:
    """Remember `note` for later runs; where the cache folder cannot be written, the work is simply done again."""
    try:
        with atomic_write(_note_path(kind, subject)) as temporary:
            temporary.write_text(json.dumps(note), encoding="utf-8")
    except OSError:
        return


def note_file(kind: str, subject) -> Path:
    """Where a note of `subject` (a path) may be kept that is no JSON, as a safetensors file."""
    return _note_path(kind, subject).with_suffix(".safetensors")


def note_folder(kind: str, subject) -> Path:
    """Where pictures made of `subject` (a path) may be kept; it need not exist."""
    return cache_folder() / kind / _digest(subject)


def file_state(status: os.stat_result) -> list[int]:
    """What changes when a file is written again: its size and its time."""
    return [status.st_size, status.st_mtime_ns]


def _note_path(kind, subject) -> Path:
    return cache_folder() / kind / f"{_digest(subject)}.json"


def _digest(subject) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(subject))).hexdigest()[:24]
