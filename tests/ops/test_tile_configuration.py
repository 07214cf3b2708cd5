"""Kernels on the processor's matrix tiles leave the tiles' configuration as they found it.

It belongs to the thread. oneDNN remembers which one it has set and does not set it again, so that after a kernel that
left another one its next product in bfloat16 would be of wrong numbers, or end the process.
"""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch
from row_cases import all_cases, arguments_of, case_name

from lfm_fast import _library

SOURCE = """
#include <immintrin.h>
extern "C" void load_tiles(const void* configuration) { _tile_loadconfig(configuration); }
extern "C" void store_tiles(void* configuration) { _tile_storeconfig(configuration); }
"""


@pytest.fixture(scope="module")
def tiles(library, tmp_path_factory):
    """Functions that load and store this thread's configuration."""
    if not _library.has_tiles():
        pytest.skip("this processor, or its system, has no AMX to give")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "tiles.cpp").write_text(SOURCE)
    command = [compiler, "-shared", "-fPIC", "-mamx-tile", str(folder / "tiles.cpp"), "-o", str(folder / "tiles.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "tiles.so"))


def configuration(rows, row_bytes):
    """Palette 1, eight tiles of `rows` rows of `row_bytes`: 64 bytes as `ldtilecfg` takes them."""
    return bytes([1, *[0] * 15]) + row_bytes.to_bytes(2, "little") * 8 + bytes(16) + bytes([rows] * 8) + bytes(8)


def calls():
    """(name, kernel, arguments) of every case in bfloat16 that a compiled kernel on the CPU serves."""
    for row, case in (parameter.values for parameter in all_cases()):
        args = arguments_of(row, case)
        for backend in row.compiled:
            low = any(isinstance(x, torch.Tensor) and x.dtype is torch.bfloat16 for x in args)
            if low and backend.name == "cpp" and backend.refusal(args) is None:
                yield case_name(row.name, case), row.kernels["cpp"], args


def test_the_configuration_is_the_one_before(tiles):
    """On this thread: one alone does the work of a call."""
    before, found = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiles.store_tiles(before)
    names = []
    try:
        for name, kernel, args in calls():
            mine = configuration(3, 20)
            tiles.load_tiles(mine)
            kernel(*args)
            tiles.store_tiles(found)
            assert found.raw == mine, name
            names.append(name)
    finally:
        tiles.load_tiles(before)
        torch.set_num_threads(threads)
    assert any(name.startswith("attention") for name in names)
