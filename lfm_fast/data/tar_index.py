"""Where every file of a tar archive lies in it: names, offsets and sizes, read from the headers alone.

Source: POSIX.1-2001, pax interchange format, with ustar as its base; GNU's long names. Python's tarfile takes a
damaged header in the middle for the end of the archive; here it is said, with what may be lost.
"""

import re
from dataclasses import dataclass, field

from lfm_fast.data.archive import Archive

_BLOCK = 512
_LONGEST_TEXT = 1 << 20  # bytes of a pax header or a long name
_AFTER_END = 1 << 16  # bytes behind the end mark that are looked at
_SUM = slice(148, 156)  # of all bytes of the header, these taken for spaces
_REGULAR, _ODD = (b"0", b"\x00", b"7"), (b"1", b"2", b"S")  # kinds of files; links and GNU's files with holes
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_OCTAL = re.compile(rb"[0-7]*")
_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


@dataclass
class TarIndex:
    """Files (name, offset, size) in the archive's order, and [(name, reason)] of what cannot be read from it."""

    files: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class _Damaged(Exception):
    """What is wrong, in a few words."""


def index_tar(archive: Archive) -> TarIndex:
    """The index of an archive that is not compressed; one that is damaged or cut off is read up to there.

    Raises:
        UnusableImage: the file cannot be read.
    """
    index = TarIndex()
    with archive.opened() as read:
        offset, named = 0, {}
        while True:
            try:
                header = _header(read, offset, archive.size)
                if header is None:
                    _require_end(read, offset, archive.size)
                    return index
                offset, named = _take(read, archive, index, offset + _BLOCK, header, named)
            except _Damaged as error:
                says = f"from byte {offset} on {error}; what follows is lost" if offset else str(error)
                index.skipped.append((archive.path.name, says))
                return index


def _header(read, offset, size) -> bytes | None:
    """The 512 bytes there; None at the end mark."""
    if offset + _BLOCK > size:
        raise _Damaged("it is cut off" if offset else "it is no tar archive")
    header = read(offset, _BLOCK)
    if not any(header):
        return None
    if not offset and header.startswith(_COMPRESSED):
        raise _Damaged("it is compressed, which allows no random access: unpack it to .tar")
    said = header[_SUM].strip(b" \x00")
    if not _OCTAL.fullmatch(said) or int(said or b"0", 8) != sum(header) - sum(header[_SUM]) + 8 * ord(" "):
        raise _Damaged("it is damaged" if offset else "it is no tar archive")
    return header


def _take(read, archive, index, offset, header, named):
    """Note the member whose content begins at offset; gives (offset of the next header, what is said of the next)."""
    kind, size = header[156:157], _number(header[124:136])
    of_next = kind in (b"x", b"g", b"L", b"K")  # pax headers, GNU's long names
    if not of_next:
        size = named.get("size", size)
    if offset + size > archive.size:
        raise _Damaged("it is cut off")
    after = offset + -(-size // _BLOCK) * _BLOCK
    if of_next:
        if size > _LONGEST_TEXT:
            raise _Damaged("it is damaged")
        text = read(offset, size)
        named = named | (_pax(text) if kind == b"x" else {"name": text.rstrip(b"\x00")} if kind == b"L" else {})
        return after, named
    name = (named.get("name") or _name(header)).decode("utf-8", "surrogateescape")
    if kind in _ODD or "sparse" in named:
        index.skipped.append((f"{archive.path.name}/{name}", "it is a link or has holes"))
    elif kind in _REGULAR and not name.endswith("/"):
        index.files.append((name, offset, size))
    return after, {}


def _require_end(read, offset, size):
    """Two archives written one after another would end at the first one's mark."""
    rest = read(offset, min(size - offset, _AFTER_END))
    if any(rest):
        raise _Damaged("there is more behind the end mark: unpack it and pack it as one archive")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's big-endian number behind a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \x00")
    if not _OCTAL.fullmatch(digits):
        raise _Damaged("it is damaged")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\x00")[0]
    prefix = header[345:500].split(b"\x00")[0] if header[257:263] == b"ustar\x00" else b""  # GNU keeps times there
    return prefix + b"/" + name if prefix else name


def _pax(text: bytes) -> dict:
    """What a pax header says of the next member, of what matters here; records are LENGTH KEY=VALUE."""
    said, place = {}, 0
    while place < len(text):
        match = _RECORD.match(text, place)
        end = place + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(text) or text[end - 1] != ord("\n"):
            raise _Damaged("it is damaged")
        key, value = match[2], text[match.end() : end - 1]
        if key == b"path":
            said["name"] = value
        elif key == b"size":
            said["size"] = _decimal(value)
        elif key.startswith(b"GNU.sparse"):
            said["sparse"] = True
        place = end
    return said


def _decimal(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise _Damaged("it is damaged")
    return int(digits)
