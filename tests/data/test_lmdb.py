"""LMDB environments written by the lmdb package itself, read back by the walk of the file, and damaged ones refused."""

import io
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm_fast.data import open_images
from lfm_fast.data.archive import Archive
from lfm_fast.data.lmdb_store import open_lmdb
from lfm_fast.data.lmdb_tree import find_values
from lfm_fast.data.opening import open_store

lmdb = pytest.importorskip("lmdb")

GENERATOR = np.random.default_rng(0)


def write(path, items, **options):
    """A real environment of {key: value}."""
    with (
        lmdb.open(str(path), map_size=1 << 28, sync=False, **options) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in items.items():
            transaction.put(key, value)
    return path


def pixels(side=20, count=3):
    return GENERATOR.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def encoded(picture, kind="png"):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def content(path):
    """All (key, value) by the walk."""
    archive = Archive(path / "data.mdb" if path.is_dir() else path)
    values = find_values(archive)
    return [(key, values.read(archive, k)) for k, key in enumerate(values.keys)]


def content_by_lmdb(path):
    with lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir()) as environment:
        return list(environment.begin().cursor())


# -- the walk gives what LMDB gives


@pytest.mark.parametrize("count", [0, 1, 2, 500, 5000])
def test_every_key_and_value_of_a_tree_of_any_depth(tmp_path, count):
    sizes = (0, 1, 17, 900, 2000, 2040, 2100, 4080, 4081, 9000)  # in the leaf, alone, and across several pages
    items = {b"%07d" % (k * 37 % 10007): bytes([k % 256]) * sizes[k % len(sizes)] for k in range(count)}
    path = write(tmp_path / "env", items)
    assert content(path) == content_by_lmdb(path) == sorted(items.items())


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=511), st.binary(max_size=6000), max_size=60), st.data())
def test_any_keys_and_values_after_changes(tmp_path_factory, items, data):
    """Values replaced, deleted and put again leave free pages and shorter values in longer runs."""
    path = write(tmp_path_factory.mktemp("any") / "env", items)
    if items:
        changed = {key: data.draw(st.binary(max_size=3000)) for key in list(items)[::2]}
        write(path, changed)
        with (
            lmdb.open(str(path), map_size=1 << 28, sync=False) as environment,
            environment.begin(write=True) as transaction,
        ):
            for key in list(items)[::3]:
                transaction.delete(key)
    assert content(path) == content_by_lmdb(path)


def test_the_newest_transaction_counts_on_either_page(tmp_path):
    """They are written to page 1 and page 0 in turn."""
    for k in range(4):
        path = write(tmp_path / "env", {b"%d" % k: b"x" * k})
        assert content(path) == content_by_lmdb(path) == [(b"%d" % n, b"x" * n) for n in range(k + 1)]


def test_values_of_more_than_64_kilobytes(tmp_path):
    """Sizes come in two halves. A page's header before a value may take a page more than the value."""
    items = {b"%d" % size: bytes([size % 251]) * size for size in (65_535, 65_536, 65_537, 200_000, 20_464, 20_480)}
    path = write(tmp_path / "env", items)
    assert content(path) == content_by_lmdb(path) == sorted(items.items())


def test_an_environment_in_one_file(tmp_path):
    path = write(tmp_path / "one.lmdb", {b"a": b"x" * 5000}, subdir=False)
    assert content(path) == [(b"a", b"x" * 5000)]
    assert open_store(path).names == ["a"]


# -- the data sets' layouts


def test_bare_rgb_in_order_of_number_and_its_splits(tmp_path):
    """NVAE's CelebA-HQ and FFHQ: keys are str(index), values height x width x 3 bytes."""
    pictures = pixels(count=12)
    write(tmp_path / "train.lmdb", {b"%d" % k: p.tobytes() for k, p in enumerate(pictures[:11])})
    write(tmp_path / "validation.lmdb", {b"0": pictures[11].tobytes()})
    for layout in ("auto", "lmdb", "lmdb-raw"):
        images = open_images(tmp_path, 20, layout=layout)
        assert images.names == [str(k) for k in range(11)]  # and not 0, 1, 10, 2
        assert torch.equal(images.batch(range(11)), torch.from_numpy(pictures[:11]).permute(0, 3, 1, 2))
    held_out = open_images(tmp_path, 20, split="held_out")
    assert torch.equal(held_out.load(0), torch.from_numpy(pictures[11]).permute(2, 0, 1))
    together = open_images(tmp_path, 20, split="all")
    assert together.names == [f"train.lmdb/{k}" for k in range(11)] + ["validation.lmdb/0"]
    assert together.class_names == ["all"]
    assert open_images(tmp_path / "train.lmdb", 16).batch([10]).shape == (1, 3, 16, 16)


def test_encoded_pictures_under_numbers(tmp_path):
    """CelebA-HQ 512 and 1024: the same keys, values are files."""
    pictures = pixels(24, 11)
    write(tmp_path / "env", {b"%d" % k: encoded(p) for k, p in enumerate(pictures)})
    images = open_images(tmp_path / "env", 24)
    assert torch.equal(images.batch(range(11)), torch.from_numpy(pictures).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"has values of \d+ bytes, which are no square of RGB pixels"):
        open_images(tmp_path / "env", 24, layout="lmdb-raw")


def test_bare_pixels_that_begin_as_a_file_does_are_bare(tmp_path):
    pictures = pixels(20, 5)
    pictures[1].reshape(-1)[:15] = np.frombuffer(b"P6\n16 16\n255\n\0\0", np.uint8)
    images = open_images(write(tmp_path / "env", {b"%d" % k: p.tobytes() for k, p in enumerate(pictures)}), 20)
    assert torch.equal(images.batch(range(5)), torch.from_numpy(pictures).permute(0, 3, 1, 2))
    items = {b"%d" % k: encoded(p) for k, p in enumerate(pictures)} | {b"0": b"hello", b"1": b"", b"2": b"no"}
    assert open_images(write(tmp_path / "files", items), 20).names == ["3", "4"]  # and here most of them do not


def test_files_of_a_squares_length_are_files_though_the_first_is_damaged(tmp_path):
    """Four of five begin as files do. Of LSUN all are, whatever they look like."""
    for name, damaged in (("env", 1), ("bedroom_train_lmdb", 4)):
        values = [encoded(p).ljust(3 * 40 * 40, b"\0") for p in pixels(20, 5)]
        values[:damaged] = [bytes(3 * 40 * 40)] * damaged
        images = open_images(write(tmp_path / name, {b"%d" % k: value for k, value in enumerate(values)}), 16)
        assert images.names == [str(k) for k in range(damaged, 5)]


def test_empty_values_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"None of the 2 images .* Skipped 2 images .it is empty .zero bytes.*: 0, 1"):
        open_images(write(tmp_path / "env", {b"0": b"", b"1": b""}), 16)


@pytest.mark.parametrize("key", [b"length", b"num-samples", b"__len__", b"__keys__"])
def test_what_writers_add_is_no_picture(tmp_path, key):
    items = {b"%d" % k: encoded(p) for k, p in enumerate(pixels(count=11))} | {key: b"11"}
    store = open_store(write(tmp_path / "env", items))
    assert (store.names, store.skipped) == ([str(k) for k in range(11)], [])


def test_several_resolutions_give_the_highest(tmp_path):
    """Keys RESOLUTION-NUMBER with the number of pictures under b"length"."""
    small, large = pixels(16, 2), pixels(32, 2)
    items = {b"16-%05d" % k: encoded(p) for k, p in enumerate(small)}
    items |= {b"32-%05d" % k: encoded(p) for k, p in enumerate(large)} | {b"length": b"2"}
    images = open_images(write(tmp_path / "env", items), 32)
    assert images.names == ["32-00000", "32-00001"]
    assert torch.equal(images.load(1), torch.from_numpy(large[1]).permute(2, 0, 1))
    items = {b"%d-%d" % (size, k): encoded(small[0]) for size in (8, 16, 128) for k in range(11)}
    assert open_store(write(tmp_path / "unpadded", items)).names == [f"128-{k}" for k in range(11)]


@pytest.fixture
def lsun(tmp_path):
    """Keys are digests, so pictures have no order but that of their bytes."""
    for name, count in (("bedroom_train", 5), ("church_outdoor_train", 3), ("bedroom_val", 2)):
        keys = [bytes(GENERATOR.choice(list(b"0123456789abcdef"), 40).tolist()) for _ in range(count)]
        write(tmp_path / f"{name}_lmdb", {key: encoded(pixels(count=1)[0], "webp") for key in keys})
    return tmp_path


def test_lsun_has_a_class_for_each_scene(lsun):
    images = open_images(lsun, 16)
    assert images.class_names == ["bedroom", "church_outdoor"]
    assert images.labels.tolist() == [0] * 5 + [1] * 3
    assert images.names[:5] == sorted(images.names[:5])
    assert len(open_images(lsun, 16, split="held_out")) == 2
    assert len(open_images(lsun, 16, split="all")) == 10
    alone = open_images(lsun / "bedroom_train_lmdb", 16)
    assert alone.class_names == ["bedroom"]
    assert [f"bedroom_train_lmdb/{name}" for name in alone.names] == images.names[:5]
    assert len(open_images(lsun / "bedroom_val_lmdb", 16, split="held_out")) == 2
    for path, split in (("bedroom_train_lmdb", "held_out"), ("bedroom_val_lmdb", "train")):
        with pytest.raises(ValueError, match=f"holds no LMDB environment of split '{split}'"):
            open_images(lsun / path, 16, split=split)


def test_the_first_of_lsun_for_compatibility(lsun, monkeypatch):
    monkeypatch.setattr("lfm_fast.data.opening.FIRST_OF_LSUN", 4)
    path = lsun / "bedroom_train_lmdb"
    assert open_images(path, 16, compat="lfm").names == open_images(path, 16).names[:4]
    store = open_store(path, compat="lfm")
    assert len(store.names) == len(store.labels) == 4
    assert len(open_images(path, 16, layout="lmdb", compat="lfm")) == 5  # of LSUN alone


def test_environments_of_other_names_are_classes(tmp_path):
    for name in ("cats.lmdb", "dogs"):
        write(tmp_path / name, {b"a": encoded(pixels(count=1)[0])})
    write(tmp_path / "dogs-2.mdb", {b"a": encoded(pixels(count=1)[0])}, subdir=False)
    images = open_images(tmp_path, 16)
    assert (images.class_names, images.labels.tolist()) == (["cats", "dogs", "dogs-2.mdb"], [0, 1, 2])
    assert images.names == ["cats.lmdb/a", "dogs/a", "dogs-2.mdb/a"]


def test_classes_are_in_order_of_their_own_names(tmp_path):
    """In order of the folders' names "a-b" would be before "a.lmdb"."""
    for name in ("a.lmdb", "a-b"):
        write(tmp_path / name, {b"k": encoded(pixels(count=1)[0])})
    store = open_store(tmp_path)
    assert store.class_names == ["a", "a-b"]
    assert {name: store.class_names[label] for name, label in zip(store.names, store.labels)} == {
        "a-b/k": "a-b",
        "a.lmdb/k": "a",
    }


def test_it_is_read_in_a_forked_process_and_in_threads(tmp_path):
    path = write(tmp_path / "env", {b"%d" % k: bytes([k]) * 3 * 16 * 16 for k in range(8)})
    images = open_images(path, 16)
    images.batch(range(8))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        firsts = pool.map(images.store.read, range(8))
    assert [first[0] for first in firsts] == list(range(8))


# -- faults


def test_values_of_another_size_are_skipped_and_named(tmp_path):
    items = {b"%d" % k: p.tobytes() for k, p in enumerate(pixels(count=4))}
    images = open_images(write(tmp_path / "env", items | {b"2": b"short", b"3": b""}), 20)
    assert images.names == ["0", "1"]
    assert images.report.skipped == [("2", "it has 5 bytes, not 20x20x3"), ("3", "it has 0 bytes, not 20x20x3")]


def test_values_that_are_no_pictures_are_skipped_and_named(tmp_path):
    items = {b"a": encoded(pixels(count=1)[0]), b"b": b"hello", b"c": b"", b"d": encoded(pixels(count=1)[0])[:-30]}
    bomb = bytearray(encoded(pixels(count=1)[0]))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # a header that promises ten gigabytes
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    items[b"e"] = bytes(bomb)
    images = open_images(write(tmp_path / "env", items), 16)
    assert images.names == ["a"]
    reasons = dict(images.report.skipped)
    assert "not an image" in reasons["b"]
    assert "zero bytes" in reasons["c"]
    assert "damaged or truncated" in reasons["d"]
    assert "more pixels than can be decoded" in reasons["e"]


def damaged_copy(path, place, fill):
    file = path / "data.mdb"
    data = bytearray(file.read_bytes())
    data[place : place + len(fill)] = fill
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "fill", "says"),
    [
        (16, b"\0\0\0\0", "does not begin as LMDB's do"),
        (20, b"\2", "data version is 2"),
        (40, struct.pack("<I", 4097), "contradicts itself"),
        (0, b"\7", "contradicts itself"),
    ],
)
def test_a_damaged_first_page_is_a_sentence(tmp_path, place, fill, says):
    path = write(tmp_path / "env", {b"a": b"x" * 5000})
    damaged_copy(path, place, fill)
    with pytest.raises(ValueError, match=f"environment .* is damaged: .*{says}"):
        open_lmdb(path, "train")


def cut(path, share):
    file = path / "data.mdb"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


@pytest.mark.parametrize("share", [0.00001, 0.1, 0.5, 0.9])
def test_a_tree_that_was_cut_off_is_refused(tmp_path, share):
    """Which entries are lost cannot be known then. LMDB reads behind the end of the file, which ends the process."""
    path = write(tmp_path / "env", {b"%05d" % k: b"x" * 50 for k in range(3000)})
    cut(path, share)
    with pytest.raises(ValueError, match="is damaged: it lies behind the end of its archive"):
        open_lmdb(path, "train")


def test_pictures_that_were_cut_off_are_named(tmp_path):
    path = write(tmp_path / "env", {b"%03d" % k: encoded(p) for k, p in enumerate(pixels(80, 9))})
    cut(path, 0.6)
    images = open_images(path, 16)
    assert len(images) == 5
    assert [name for name, _ in images.report.skipped] == ["005", "006", "007", "008"]
    assert {reason for _, reason in images.report.skipped} == {"it lies behind the end of its archive"}


def test_two_keys_with_one_value_are_refused(tmp_path):
    """As a changed page number would make of them; LMDB itself would show one picture twice."""
    path = write(tmp_path / "env", {b"a": b"x" * 5000, b"b": b"y" * 5000})
    values = find_values(Archive(path / "data.mdb"))
    first, second = (int(offset) // 4096 for offset in values.offset)
    data = (path / "data.mdb").read_bytes()
    assert data.count(b"\1\0b" + struct.pack("<Q", second)) == 1
    (path / "data.mdb").write_bytes(
        data.replace(b"\1\0b" + struct.pack("<Q", second), b"\1\0b" + struct.pack("<Q", first))
    )
    with pytest.raises(ValueError, match="two keys have one value"):
        open_lmdb(path, "train")


def test_an_environment_that_changes_during_a_run_stops_it_with_a_sentence(tmp_path):
    path = write(tmp_path / "env", {b"%d" % k: p.tobytes() for k, p in enumerate(pixels(count=4))})
    images = open_images(path, 20)
    write(path, {b"0": b"other"})
    with pytest.raises(ValueError, match=r"0 in .* was readable when it was checked, but now its archive has changed"):
        images.load(0)
    os.remove(path / "data.mdb")
    with pytest.raises(ValueError, match="its archive cannot be read"):
        images.batch([1, 2])


def test_what_holds_no_pictures_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="its LMDB environment is empty"):
        open_store(write(tmp_path / "empty", {}), "lmdb")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no LMDB environment of split 'train'"):
        open_store(tmp_path / "folder", "lmdb")
    with pytest.raises(ValueError, match="is no LMDB environment and no folder"):
        open_store(tmp_path / "nowhere", "lmdb")
    with pytest.raises(ValueError, match="holds no LMDB environment of split 'train'"):
        open_store(tmp_path, "lsun")
    with pytest.raises(ValueError, match=r"split='held_out': .*empty is used whole"):
        open_store(tmp_path / "empty", "lmdb", "held_out")


def test_named_databases_and_several_values_for_a_key_are_refused(tmp_path):
    with lmdb.open(str(tmp_path / "named"), max_dbs=2) as environment:
        inner = environment.open_db(b"pictures")
        with environment.begin(write=True, db=inner) as transaction:
            transaction.put(b"a", b"x")
    with pytest.raises(ValueError, match="it holds named databases"):
        open_store(tmp_path / "named", "lmdb")
