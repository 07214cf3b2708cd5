"""The compiled CPU kernels give the same bits with every instruction set, number of threads and batch size."""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_cases import ROWS, all_cases, alone, arguments_of, case_name, has_samples, outputs, per_sample_results, results

from lfm_fast import _library

LEVELS = ("baseline", "avx2", "avx512")
COMPILED = {name: row for name, row in ROWS.items() if any(b.name == "cpp" for b in row.compiled)}
# one level has them, and their threads and batches are in tests of their own
TILES_ALONE = {"attention", "attention_with_lse", "attention_backward", "packed_linear", "packed_linear_int8"}
TILES_ALONE |= {"tile_linear", "tile_linear_backward", "tile_mlp", "tile_mlp_backward"}
SAME_AT_ALL = {name: row for name, row in COMPILED.items() if name not in TILES_ALONE}
ROOT = Path(__file__).resolve().parents[2]
MANY_CHUNKS = 20_011  # elements of a sample: several chunks of partial sums, the last tile and block cut short


def digest(result):
    """A hash of the outputs' bits, so that -0 differs from 0 and one NaN from another."""
    parts = [
        (tuple(x.shape), str(x.dtype), x.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for x in result
    ]
    return hashlib.sha256(repr([(s, d) for s, d, _ in parts]).encode() + b"".join(b for _, _, b in parts)).hexdigest()


def compiled_cases():
    """Every case of every row that the compiled backend takes, by name."""
    for row, case in (parameter.values for parameter in all_cases()):
        args = arguments_of(row, case)
        if any(b.name == "cpp" and b.available() is None and b.why_not(*args) is None for b in row.compiled):
            yield case_name(row.name, case), row, args


def level_in_use():
    function = ctypes.CDLL(str(_library.path())).lfm_fast_cpu_level
    function.restype = ctypes.c_char_p
    return function().decode()


def print_digests():
    """What the child process does: one JSON object, the level in use and a digest for each case."""
    digests = {name: digest(results(row, args, row.kernels["cpp"])) for name, row, args in compiled_cases()}
    print(json.dumps({"level": level_in_use(), "digests": digests}))


def run_at(level):
    code = (
        "from lfm_fast import _library; assert _library.load() is None; import test_cpu_levels as t; t.print_digests()"
    )
    environment = {
        **os.environ,
        "LFM_FAST_CPU_LEVEL": level,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def by_level(library):
    """{level: {case: digest}} for the levels of this machine, each from a process that was forced to it."""
    found = {}
    for level in LEVELS:
        child = run_at(level)
        if "which this machine does not have" in child.stderr:
            continue
        assert child.returncode == 0, child.stderr
        report = json.loads(child.stdout)
        assert report["level"] == level
        found[level] = report["digests"]
    return found


def test_every_level_gives_the_same_bits(by_level):
    if len(by_level) == 1:
        pytest.skip("this machine has the baseline alone")
    first = by_level["baseline"]
    assert {name.split("-")[0] for name in first} == set(COMPILED) - TILES_ALONE
    for level, digests in by_level.items():
        different = [name for name in first if digests[name] != first[name]]
        assert {name for name in digests if name.split("-")[0] not in TILES_ALONE} == first.keys()
        assert not different, f"{level} differs from the baseline in {', '.join(different)}"


def test_noise_of_every_level_is_the_reference_to_the_bit(by_level):
    row = ROWS["philox_normal"]
    cases = [(case_name(row.name, case), arguments_of(row, case)) for case in row.cases]
    assert sum(args[0].numel() * args[1] for _, args in cases) > 100_000
    for name, args in cases:
        want = digest(outputs(row.reference(*args)))
        assert {level: digests[name] for level, digests in by_level.items()} == dict.fromkeys(by_level, want), name


def test_an_unknown_level_is_refused_with_a_sentence(library):
    child = run_at("sse9")
    assert child.returncode != 0
    assert 'LFM_FAST_CPU_LEVEL must be avx512, avx2 or baseline, got "sse9".' in child.stderr


def long_samples(row):
    """The row's first case at a size where one sample is several chunks; three samples that differ."""
    tokens = len(row.cases[0].get("shape", ())) == 3
    shape = (3, 67, 301) if tokens else (3, MANY_CHUNKS)
    settings = {
        "guided_step": {"error": True, "num_stored": 2, "noise": True},
        "group_norm_silu": {"shape": (3, 4, 97, 103)},
        "group_norm_silu_backward": {"shape": (3, 4, 97, 103)},
        "adamw_ema": {"shapes": ((7,), (3, MANY_CHUNKS), (1,), (513, 129))},
    }
    named = {} if row.mutates else {"shape": shape}
    return arguments_of(row, {**row.cases[0], **named, **settings.get(row.name, {})})


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", SAME_AT_ALL.values(), ids=SAME_AT_ALL)
def test_threads_do_not_change_a_bit(row, library, restore_threads):
    args = long_samples(row)
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(digest(results(row, args, row.kernels["cpp"])))
    assert len(found) == 1


@pytest.mark.parametrize("row", [row for row in SAME_AT_ALL.values() if has_samples(row)], ids=lambda row: row.name)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(row, library):
    args = long_samples(row)
    together = per_sample_results(row, outputs(row.kernels["cpp"](*args)))
    for i in range(3):
        single = per_sample_results(row, outputs(row.kernels["cpp"](*alone(row, args, i))))
        assert digest(single) == digest([x[i : i + 1] for x in together])
