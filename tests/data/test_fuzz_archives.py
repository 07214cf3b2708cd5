"""Thousands of damaged archives, pickles, lists and tables: what is read is what was written, or it is a sentence."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.fuzz]

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
MUTANTS = 20_000 if FULL else 1_000  # of each form
SECONDS = 1200 if FULL else 150

# in a process of its own, whose memory is bounded, so that one that crashes or never ends fails the test
LIMITED = """
import json, resource, sys
import numpy as np
from lfm_fast.data.archive import Archive
from lfm_fast.data.opening import open_store
from lfm_fast.data.reading import UnusableImage
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
path, layout, split, mutants, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
generator = np.random.default_rng(seed)
FILLS = (b"\\0", b"\\xff", b"\\x01", bytes(8), b"\\xff" * 4, b"\\xff\\xff\\xff\\x7f", b"\\0\\0\\1\\0")

def mutated(whole, places):
    data = bytearray(whole)
    for _ in range(int(generator.integers(1, 4))):
        place = int(generator.choice(places))
        kind = generator.integers(8)
        if kind < 3:
            data[place % len(data)] ^= 1 << int(generator.integers(8))
        elif kind < 6:
            fill = FILLS[int(generator.integers(len(FILLS)))]
            data[place : place + len(fill)] = fill
        elif kind == 6:
            data[place : place + 8] = generator.integers(0, 256, 8).astype(np.uint8).tobytes()
        elif generator.random() < 0.3:
            del data[max(1, place):]
    return bytes(data)
"""

READ_STORES = (
    LIMITED
    + """
file, places = json.loads(sys.stdin.read())
whole = open(file, "rb").read()
healthy = open_store(path, layout, split)
expected = {name: (healthy.read(k), healthy.labels[k]) for k, name in enumerate(healthy.names)}
refused = skipped = intact = 0
for _ in range(mutants):
    with open(file, "wb") as writing:
        writing.write(mutated(whole, places))
    try:
        store = open_store(path, layout, split)
    except ValueError as error:
        assert str(error) and "\\n" not in str(error), error
        refused += 1
        continue
    read = {}
    for k, name in enumerate(store.names):
        try:
            read[name] = (store.read(k), store.labels[k])
        except UnusableImage as error:
            assert str(error)
            skipped += 1
    for name, (content, label) in read.items():
        others = {other for key, (other, _) in expected.items() if key != name}
        assert content not in others or name not in expected, f"{name} has the picture of another"
        if name in expected and content == expected[name][0]:
            assert label == expected[name][1], f"{name} has label {label}"
            intact += 1
    lost = len(expected) - len(store)  # and not by name: one may have been changed
    assert lost <= 0 or store.skipped or layout == "list", f"{lost} are lost without a word"
print(json.dumps([refused, skipped, intact]))
"""
)

READ_PICKLES = (
    LIMITED
    + """
from lfm_fast.data.plain_pickle import Refused, read_plain_pickle
whole, refused = open(path, "rb").read(), 0
for _ in range(mutants):
    try:
        read_plain_pickle(mutated(whole, range(len(whole))))
    except Refused as error:
        assert str(error)
        refused += 1
print(json.dumps([refused]))
"""
)


def run(code, *arguments, given=""):
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if FULL else 20261122
    command = [sys.executable, "-c", code, *(str(each) for each in (*arguments, MUTANTS, seed))]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def picture(number):
    """A small PNG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("sizes", [(300, 900), (300, 9000)])
def test_damaged_trees_of_lmdb(tmp_path, sizes):
    """Damage anywhere but in the values themselves, which have no checksum."""
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "env"
    values = {b"%03d" % k: picture(k).ljust(sizes[k % 2], bytes([k])) for k in range(60)}
    with lmdb.open(str(path), map_size=1 << 24, sync=False) as environment, environment.begin(write=True) as writes:
        for key, value in values.items():
            writes.put(key, value)
    whole = (path / "data.mdb").read_bytes()
    covered = np.zeros(len(whole), bool)
    for value in values.values():
        place = whole.index(value)
        covered[place : place + len(value)] = True
    heads = np.flatnonzero(~covered & (np.frombuffer(whole, np.uint8) > 0))
    places = np.unique(np.concatenate([heads, heads + 1, range(200), range(4096, 4296)])).clip(0, len(whole) - 1)
    given = json.dumps([str(path / "data.mdb"), places.tolist()])
    refused, skipped, intact = run(READ_STORES, path, "lmdb", "train", given=given)
    assert refused > MUTANTS // 10
    assert intact > MUTANTS
    assert bool(skipped) == (max(sizes) > 2000)  # values in pages of their own, where a tree may be whole but not they


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_headers_of_tars(tmp_path, format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for k in range(12):
            for name, content in ((f"{k:03d}ü.png", picture(k)), (f"{k:03d}ü.cls", b"%d" % k)):
                member = tarfile.TarInfo(name * (20 if k == 3 else 1))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = [place for member in tar for place in range(member.offset, member.offset_data)]
    refused, skipped, intact = run(READ_STORES, path, "webdataset", "train", given=json.dumps([str(path), places]))
    assert refused
    assert intact > MUTANTS
    assert skipped == 0  # what is listed is there


def test_damaged_pickles(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps({"data": pixels[:, :100].copy(), "labels": [1, 2, 300], "names": ["a", b"b"]}, protocol)
        (tmp_path / "pickle").write_bytes(content)
        assert run(READ_PICKLES, tmp_path / "pickle", "", "")[0] > MUTANTS // 10


def test_damaged_batches_of_cifar(tmp_path):
    for name in [f"data_batch_{k}" for k in range(1, 6)]:
        pixels = np.random.default_rng(int(name[-1])).integers(0, 256, (2, 3072)).astype(np.uint8)
        (tmp_path / name).write_bytes(pickle.dumps({"data": pixels, "labels": [1, 2]}, 2))
    size = (tmp_path / "data_batch_1").stat().st_size
    places = [*range(160), *range(size - 60, size)]  # its head and its labels; pixels may be any
    label = (tmp_path / "data_batch_1").read_bytes().rindex(b"K\x01K\x02")
    places = [place for place in places if place not in (label + 1, label + 3)]  # and a label any digit
    given = json.dumps([str(tmp_path / "data_batch_1"), places])
    refused, _, intact = run(READ_STORES, tmp_path, "cifar10", "train", given=given)
    assert refused > MUTANTS // 4
    assert intact


def test_damaged_lists_and_tables_of_classes(tmp_path):
    from scipy.io import savemat

    lines = "".join(f"picture {k}.png {k}\n" for k in range(40))
    (tmp_path / "list.txt").write_text(lines)
    for k in range(40):
        (tmp_path / f"picture {k}.png").write_bytes(picture(k))
    names = [place for place, character in enumerate(lines) if not character.isdigit()]  # a digit may be any other
    given = json.dumps([str(tmp_path / "list.txt"), names])
    assert run(READ_STORES, tmp_path / "list.txt", "list", "train", given=given)[0]
    for k in range(1, 3):
        folder = tmp_path / "imagenet" / "val"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{k:08d}.JPEG").write_bytes(picture(k))
    data = tmp_path / "imagenet" / "devkit" / "data"
    data.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", object), ("WNID", object)]
    table = np.array([(k, f"n{k:08d}") for k in range(1, 4)], dtype=kind)
    savemat(data / "meta.mat", {"synsets": table}, do_compression=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n")
    size = (data / "meta.mat").stat().st_size
    given = json.dumps([str(data / "meta.mat"), list(range(size))])
    assert run(READ_STORES, tmp_path / "imagenet", "imagenet", "held_out", given=given)[0] > MUTANTS // 10
