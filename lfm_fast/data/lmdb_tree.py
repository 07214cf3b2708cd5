"""Where every value of an LMDB environment lies in its file.

The file is a B+ tree of pages: pages 0 and 1 say where the root is, branches lead to leaves, leaves hold keys and short
values, and a long value lies alone in consecutive pages. It is walked once, with every number in it checked against the
file, so a damaged environment is a sentence; LMDB itself maps the file and follows such a number out of its memory.
Values are then read at their place, from any process, without the lmdb package.

Source: the format of LMDB 0.9, https://www.symas.com/lmdb, data version 1, as 64-bit little-endian machines write it.
"""

import struct
from array import array
from dataclasses import dataclass

import numpy as np

from lfm_fast.data.archive import Archive
from lfm_fast.data.reading import UnusableImage

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # bytes of a page before what it holds
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8  # kinds of pages
_LONG, _DATABASE, _DUPLICATES = 1, 2, 4  # kinds of values
_REVERSED, _SORTED_VALUES, _NUMBERS = 0x02, 0x04, 0x08  # kinds of trees
_NONE = 2**64 - 1  # the root of an empty tree
_FARTHEST = 2**62  # no file is as long
_PAGE = struct.Struct("<QHHHH")  # number, unused, kind, and where its free space begins and ends
_NODE = struct.Struct("<HHHH")  # low and high half of the value's size (or the child's number), kind, size of the key
_TREE = "IHHQQQQQ"  # unused (page size in the first), kind, depth, pages of each kind, entries, root
_FACTS = struct.Struct("<IIQQ" + 2 * _TREE + "QQ")  # magic, version, two sizes, free pages, the tree, last page, number


@dataclass(frozen=True)
class Values:
    """The values of an environment in order of their keys: keys (N,), and offset, size (N,) int64, alone (N,) bool.

    A value that is `alone` has a page header of its own right before it.
    """

    keys: list[bytes]
    offset: np.ndarray
    size: np.ndarray
    alone: np.ndarray
    page_size: int

    def read(self, archive: Archive, position: int) -> bytes:
        """The value at a position. Raises UnusableImage where it cannot be had."""
        offset, size = int(self.offset[position]), int(self.size[position])
        if not self.alone[position]:
            return archive.read(offset, size)
        with archive.opened() as read:  # twice, because to cut the header off copies the value
            number, _, kind, *_ = _PAGE.unpack(read(offset - HEADER, HEADER))
            if kind != _OVERFLOW or number * self.page_size != offset - HEADER:
                raise UnusableImage("its page in the archive is damaged")
            return read(offset, size)


@dataclass(frozen=True)
class _Root:
    page_size: int
    kind: int
    depth: int
    pages: int  # branches and leaves
    overflow_pages: int
    entries: int
    root: int
    number: int  # of the transaction that wrote it


class _Damaged(Exception):
    """What is wrong, in a few words."""


def is_environment(path) -> bool:
    """Whether a file begins as an LMDB environment does."""
    try:
        with open(path, "rb") as file:
            return file.read(HEADER + 4)[HEADER:] == struct.pack("<I", MAGIC)
    except OSError:
        return False


def find_values(archive: Archive) -> Values:
    """All values of the environment's main database.

    Raises:
        ValueError: the file is no LMDB environment of this kind, or its tree is damaged.
    """
    try:
        with archive.opened() as read:
            return _walk(read, _newest_root(read))
    except (_Damaged, UnusableImage, struct.error) as error:
        raise ValueError(f"The LMDB environment {archive.path} is damaged: {error}.") from error


def _newest_root(read) -> _Root:
    first = _root(read(0, HEADER + _FACTS.size), 0)
    second = _root(read(first.page_size, HEADER + _FACTS.size), 1)
    return max(first, second, key=lambda root: root.number)


def _root(page: bytes, number: int) -> _Root:
    """What page 0 or 1 says."""
    its_number, _, kind, _, _ = _PAGE.unpack_from(page)
    magic, version, _, _, *rest = _FACTS.unpack_from(page, HEADER)
    if magic != MAGIC:
        raise _Damaged(f"page {number} does not begin as LMDB's do on 64-bit little-endian machines")
    if version != VERSION:
        raise _Damaged(f"its data version is {version}, not {VERSION}")
    page_size = rest[0]
    _, kind_of_tree, depth, branches, leaves, overflow, entries, root = rest[8:16]
    if its_number != number or not kind & _META or page_size not in (2**k for k in range(8, 17)):
        raise _Damaged(f"page {number} contradicts itself")
    if kind_of_tree & _SORTED_VALUES:
        raise _Damaged("it has several values for a key, which no known data set of pictures has")
    return _Root(page_size, kind_of_tree, depth, branches + leaves, overflow, entries, root, rest[17])


def _walk(read, root: _Root) -> Values:
    keys, offsets, sizes, alone = [], array("q"), array("q"), bytearray()
    for number, page in _leaves(read, root):
        for place, size, kind, key_size in _nodes(number, page):
            value = place + _NODE.size + key_size
            if kind & (_DATABASE | _DUPLICATES):
                raise _Damaged("it holds named databases, and pictures are read from the main one")
            if value + (8 if kind & _LONG else size) > len(page):
                raise _Damaged(f"page {number} has a value that is longer than the page")
            offset = number * root.page_size + value
            if kind & _LONG:
                offset = int.from_bytes(page[value : value + 8], "little") * root.page_size + HEADER
                if offset >= _FARTHEST:
                    raise _Damaged(f"page {number} has a value behind the end of the file")
            keys.append(page[place + _NODE.size : value])
            offsets.append(offset)
            sizes.append(size)
            alone.append(kind & _LONG)
    places = (np.frombuffer(offsets, np.int64), np.frombuffer(sizes, np.int64), np.frombuffer(alone, bool))
    values = Values(keys, *places, root.page_size)
    _check_whole(values, root)
    return values


def _check_whole(values: Values, root: _Root) -> None:
    """Refuse what no environment can be: an entry lost, keys out of order, two keys with one value."""
    if len(values.keys) != root.entries:
        raise _Damaged(f"its tree has {len(values.keys)} entries where {root.entries} were counted")
    if not root.kind & (_REVERSED | _NUMBERS) and any(a >= b for a, b in zip(values.keys, values.keys[1:])):
        raise _Damaged("its keys are out of order")
    alone = values.offset[values.alone]
    if len(np.unique(alone)) != len(alone):
        raise _Damaged("two keys have one value")
    needed = (values.size[values.alone] + HEADER + root.page_size - 1) // root.page_size
    if int(needed.sum()) > root.overflow_pages:  # fewer: a value was replaced by a shorter one
        raise _Damaged(f"its values take {int(needed.sum())} pages where {root.overflow_pages} were counted")


def _leaves(read, root: _Root):
    """(number, bytes) of the leaves from left to right."""
    if root.root == _NONE:
        return
    waiting, seen = [(root.root, 1)], set()
    while waiting:
        number, level = waiting.pop()
        if number in seen or len(seen) >= root.pages:
            raise _Damaged(f"page {number} is reached in two ways")
        seen.add(number)
        page = read(number * root.page_size, root.page_size)
        its_number, _, kind, _, _ = _PAGE.unpack_from(page)
        expected = _LEAF if level == root.depth else _BRANCH
        if its_number != number or kind != expected:
            raise _Damaged(f"page {number} is not the {'leaf' if expected == _LEAF else 'branch'} it should be")
        if expected == _LEAF:
            yield number, page
            continue
        children = [low | kind << 32 for _, low, kind, _ in _nodes(number, page)]
        waiting += [(child, level + 1) for child in reversed(children)]


def _nodes(number, page):
    """(place, low 32 bits, kind, size of the key) of each node of a page."""
    _, _, _, lower, upper = _PAGE.unpack_from(page)
    if not HEADER <= lower <= upper <= len(page):
        raise _Damaged(f"page {number} contradicts itself")
    for place in struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER):
        if not upper <= place <= len(page) - _NODE.size:
            raise _Damaged(f"page {number} has a node outside of itself")
        low, high, kind, key_size = _NODE.unpack_from(page, place)
        if place + _NODE.size + key_size > len(page):
            raise _Damaged(f"page {number} has a key that is longer than the page")
        yield place, low | high << 16, kind, key_size
