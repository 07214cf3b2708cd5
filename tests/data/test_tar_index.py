"""Headers of tar archives one by one: the rare, the odd and the damaged, as tarfile reads them where it does."""

import tarfile

import pytest

from lfm_fast.data.archive import Archive
from lfm_fast.data.tar_index import index_tar


def raw(name, kind=tarfile.REGTYPE, content=b"", **fields):
    """The header and the content of one member, as tarfile writes a plain one, with bytes put at places of the header:
    at_124=b"..." and so on."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    for place, value in fields.items():
        start = int(place.removeprefix("at_"))
        header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def record(key, value):
    """A record of a pax header, whose length counts its own digits."""
    length = len(f" {key}={value}\n") + 2
    return f"{length} {key}={value}\n".encode()


def by_both(path, *members):
    """What is read of an archive of these members, and the names that tarfile finds."""
    path.write_bytes(b"".join(members) + bytes(1024))
    index = index_tar(Archive(path))
    with tarfile.open(path) as tar:
        return index, [member.name for member in tar]


def test_headers_for_the_next_member_in_any_order(tmp_path):
    """A long name is not lost over a header for all members, or one of a long link, that comes between."""
    of_all = raw("global", tarfile.XGLTYPE, record("comment", "of all members"))
    named = raw("pax", tarfile.XHDTYPE, record("path", "long/name.png"))
    index, names = by_both(tmp_path / "a.tar", named, of_all, raw("short.png", content=b"x"), raw("next", content=b"y"))
    assert [name for name, _, _ in index.files] == names == ["long/name.png", "next"]
    long = raw("L", tarfile.GNUTYPE_LONGNAME, b"a/long/name\0"), raw("K", tarfile.GNUTYPE_LONGLINK, b"its/target\0")
    index, names = by_both(tmp_path / "b.tar", *long, raw("short", tarfile.SYMTYPE))
    assert [name for name, _ in index.skipped] == [f"b.tar/{name}" for name in names] == ["b.tar/a/long/name"]


def test_old_and_rare_kinds_of_files(tmp_path):
    """A file of before POSIX, a contiguous one, folders with and without a kind of their own, files with holes."""
    holes = raw("pax", tarfile.XHDTYPE, record("GNU.sparse.major", "1"))
    members = raw("old", tarfile.AREGTYPE, b"o"), raw("one", tarfile.CONTTYPE, b"c"), raw("d/", tarfile.AREGTYPE)
    index, _ = by_both(tmp_path / "a.tar", *members, raw("e/", tarfile.DIRTYPE), raw("last", content=b"l"))
    archive = Archive(tmp_path / "a.tar")
    assert [(name, archive.read(*place)) for name, *place in index.files] == [
        ("old", b"o"),
        ("one", b"c"),
        ("last", b"l"),
    ]
    (tmp_path / "b.tar").write_bytes(
        holes + raw("holes", content=b"x") + raw("s", tarfile.GNUTYPE_SPARSE) + bytes(1024)
    )
    index = index_tar(Archive(tmp_path / "b.tar"))
    assert (index.files, [name for name, _ in index.skipped]) == ([], ["b.tar/holes", "b.tar/s"])


def test_fields_that_gnu_uses_otherwise(tmp_path):
    """A size in base 256, which need not be large; and times where POSIX has the beginning of a long name."""
    size = b"\x80" + (5).to_bytes(11, "big")
    index, names = by_both(tmp_path / "a.tar", raw("x", content=b"hello", at_124=size), raw("y"))
    assert [(name, size) for name, _, size in index.files] == [(names[0], 5), (names[1], 0)] == [("x", 5), ("y", 0)]
    (tmp_path / "b.tar").write_bytes(raw("x", at_345=b"14703045123\0" * 2) + bytes(1024))
    assert [name for name, _, _ in index_tar(Archive(tmp_path / "b.tar")).files] == ["x"]


@pytest.mark.parametrize(
    "member",
    [
        raw("pax", tarfile.XHDTYPE, b"12 path=a.p_"),  # no new line at its end
        raw("pax", tarfile.XHDTYPE, b"99 path=a.png\n"),  # longer than the header
        raw("L", tarfile.GNUTYPE_LONGNAME, b"n" * ((1 << 20) + 1)),
        raw("x", at_124=b"12a\0"),
        raw("pax", tarfile.XHDTYPE, b"10 size=-\n"),
    ],
)
def test_headers_that_cannot_be_are_named(tmp_path, member):
    (tmp_path / "a.tar").write_bytes(raw("good") + member + raw("x.png") + bytes(1024))
    index = index_tar(Archive(tmp_path / "a.tar"))
    assert [name for name, _, _ in index.files] == ["good"]
    assert index.skipped == [("a.tar", "from byte 512 on it is damaged; what follows is lost")]
