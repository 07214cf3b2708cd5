"""The walk of an LMDB environment page by page: what a tree may be, and what it cannot be."""

import contextlib
import struct

import pytest

from lfm_fast.data.archive import Archive
from lfm_fast.data.lmdb_store import open_lmdb
from lfm_fast.data.lmdb_tree import find_values
from lfm_fast.data.reading import UnusableImage

pytest.importorskip("lmdb")
from test_lmdb import content, damaged_copy, write

META = (
    16 + 24 + 48
)  # of a page, where the facts of its main tree begin: (unused, kind, depth, three counts, entries, root)


def with_facts(path, place, fill):
    """Both of the first pages say so."""
    for page in (0, 4096):
        damaged_copy(path, page + META + place, fill)


@pytest.mark.parametrize(
    ("place", "fill", "says"),
    [
        (4, b"\4", "it has several values for a key"),
        (32, struct.pack("<Q", 2), "its tree has 3 entries where 2 were counted"),
        (32, struct.pack("<Q", 4), "its tree has 3 entries where 4 were counted"),
        (24, struct.pack("<Q", 5), "its values take 6 pages where 5 were counted"),
        (8, struct.pack("<QQ", 0, 0), "page . is reached in two ways"),
        (6, b"\2", "page . is not the branch it should be"),
    ],
)
def test_facts_that_the_tree_contradicts(tmp_path, place, fill, says):
    """Two pages for each value of 4,096 bytes, because of the header before it."""
    path = write(tmp_path / "env", {key: key * 4096 for key in (b"a", b"b", b"c")})
    with_facts(path, place, fill)
    with pytest.raises(ValueError, match=f"is damaged: {says}"):
        open_lmdb(path, "train")


@pytest.mark.parametrize(("kind", "fine"), [(0, False), (2, True), (8, True)])
def test_keys_in_another_order_than_of_their_bytes(tmp_path, kind, fine):
    """Trees of reversed keys and of numbers in the machine's bytes have one of their own."""
    path = write(tmp_path / "env", {b"\1\2": b"x", b"\2\1": b"y"})
    with_facts(path, 4, bytes([kind]))
    file = path / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"\2\0\1\2x", b"\2\0\3\1x"))
    if fine:
        assert content(path) == [(b"\3\1", b"x"), (b"\2\1", b"y")]
    else:
        with pytest.raises(ValueError, match="its keys are out of order"):
            open_lmdb(path, "train")


def test_a_long_value_whose_page_is_another_is_not_read(tmp_path):
    """Both what kind of page it is and its number are looked at when it is read."""
    for place, fill in ((0, b"\7"), (10, b"\2")):
        path = write(tmp_path / f"env{place}", {b"a": b"x" * 5000})
        values = find_values(Archive(path / "data.mdb"))
        damaged_copy(path, int(values.offset[0]) - 16 + place, fill)
        with pytest.raises(UnusableImage, match="its page in the archive is damaged"):
            open_lmdb(path, "train", raw=False).read(0)


class Pages:
    """An archive of a few pages, anywhere in a file that no disk could hold."""

    path = "sparse"

    def __init__(self, pages, side=4096):
        self.pages, self.side = pages, side

    @contextlib.contextmanager
    def opened(self):
        yield lambda offset, size: self.pages[offset // self.side][:size].ljust(size, b"\0")


def page(number, kind, nodes, upper=None, side=4096):
    """A page of (low, high, kind, key, value) nodes."""
    places, body = [], b""
    for low, high, flags, key, value in reversed(nodes):
        body = struct.pack("<HHHH", low, high, flags, len(key)) + key + value + body
        places.insert(0, side - len(body))
    lower = 16 + 2 * len(nodes)
    head = struct.pack("<QHHHH", number, 0, kind, lower, side - len(body) if upper is None else upper)
    return (head + struct.pack(f"<{len(nodes)}H", *places)).ljust(side - len(body), b"\0") + body


def first_pages(root, depth, branches, leaves, entries, side=4096):
    facts = struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 0) + struct.pack("<IHHQQQQQ", side, 0, 0, 0, 0, 0, 0, 2**64 - 1)
    facts += struct.pack("<IHHQQQQQ", 0, 0, depth, branches, leaves, 0, entries, root) + struct.pack("<QQ", root, 1)
    return {number: struct.pack("<QHHHH", number, 0, 8, 0, 0) + facts for number in (0, 1)}


def test_pages_beyond_sixteen_terabytes():
    """A child's number has 48 bits, of which 16 stand where a leaf has the kind of a value."""
    leaf, root = 2**33 + 70_000, 5
    child = (leaf & 0xFFFF, leaf >> 16 & 0xFFFF, leaf >> 32, b"", b"")
    pages = first_pages(root, 2, 1, 1, 1) | {root: page(root, 1, [child]), leaf: page(leaf, 2, [(1, 0, 0, b"k", b"v")])}
    values = find_values(Pages(pages))
    assert (values.keys, values.offset.tolist()) == ([b"k"], [leaf * 4096 + 4095])


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (page(7, 2, [(1, 0, 0, b"k", b"v")]), "page 6 is not the leaf it should be"),  # another page's
        (page(6, 1, [(1, 0, 0, b"k", b"v")]), "page 6 is not the leaf it should be"),
        (page(6, 2, [(1, 0, 0, b"k", b"v")], upper=17), "page 6 contradicts itself"),
        (page(6, 2, [(1, 0, 4, b"k", b"v")]), "it holds named databases"),
        (page(6, 2, [(2, 0, 0, b"k", b"v")]), "page 6 has a value that is longer than the page"),
    ],
)
def test_leaves_that_cannot_be(leaf, says):
    for children in (1, 2):
        child = (6, 0, 0, b"", b"")
        pages = first_pages(5, 2, 1, children, children) | {5: page(5, 1, [child] * children), 6: leaf}
        with pytest.raises(ValueError, match=says):
            find_values(Pages(pages))
    good = page(6, 2, [(1, 0, 0, b"k", b"v")])
    with pytest.raises(ValueError, match="page 6 is reached in two ways"):
        find_values(Pages(pages | {6: good}))


@pytest.mark.parametrize("side", [256, 16384, 32768])
def test_pages_of_other_machines_sizes(side):
    leaf = page(2, 2, [(1, 0, 0, b"k", b"v")], side=side)
    assert find_values(Pages(first_pages(2, 1, 0, 1, 1, side) | {2: leaf}, side)).offset.tolist() == [3 * side - 1]


@pytest.mark.parametrize("side", [128, 4097, 131_072])
def test_sizes_that_no_page_has(side):
    with pytest.raises(ValueError, match="page 0 contradicts itself"):
        find_values(Pages(first_pages(2, 1, 0, 1, 1, side), side))
