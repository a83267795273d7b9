"""Image files that hold the pixels and nothing else: what a PNG or JPEG is without all that nobody sees."""

import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .images import UNREADABLE


PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type; none for palettes, which may hold colours of no pixel
JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")  # says that the colours are the usual, and no more
QUANTISATION, HUFFMAN, FRAMES, SCAN, JPEG_END = 0xDB, 0xC4, (0xC0, 0xC1), 0xDA, b"\xff\xd9"
SAYS_NOTHING = (*range(0xE0, 0xF0), 0xFE)  # to a decoder, but for the colours: APPn and comments


def minimal(content: bytes) -> bytes | None:
    """The image file of these pixels, coded as in `content`, that holds nothing else.

    Chunks and segments that are not on a list, and all after the image's end, are left out.

    Returns:
        None where that is no proof: other formats, and files whose coded pixels may be more than those that are shown,
        as those that lie outside a crop.
    """
    try:
        if content.startswith(PNG_START):
            return minimal_png(content)
        return minimal_jpeg(content) if content.startswith(b"\xff\xd8") else None
    except (struct.error, zlib.error, IndexError, *UNREADABLE):  # readable in a way that is not foreseen here
        return None


def minimal_png(content: bytes) -> bytes | None:
    """`minimal` for a PNG: header, coded pixels, end; the coded pixels must be as many as the header says."""
    chunks, place = list[bytes](), len(PNG_START)
    while not chunks or chunks[-1][4:8] != b"IEND":
        end = place + 12 + struct.unpack_from(">I", content, place)[0]
        chunks.append(content[place:end])
        place = end
    header, *coded, _ = (chunk for chunk in chunks if chunk[4:8] in (b"IHDR", b"IDAT", b"IEND"))
    if any(zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]) for chunk in (header, *coded)):
        return None
    width, height, depth, colours, *ways = struct.unpack(">IIBBBBB", header[8:-4])
    if colours not in PNG_CHANNELS or any(ways):  # interlaced, or ways to code that there are not
        return None
    size = height * (1 + (width * depth * PNG_CHANNELS[colours] + 7) // 8)
    unpack = zlib.decompressobj()
    pixels = unpack.decompress(b"".join(chunk[8:-4] for chunk in coded), size + 1)
    whole = len(pixels) == size and unpack.eof and not unpack.unused_data
    return b"".join((PNG_START, header, *coded, PNG_END)) if whole else None


def minimal_jpeg(content: bytes) -> bytes | None:
    """`minimal` for a JPEG with one frame, one scan, whole blocks and no restarts; its pixels must stay the same."""
    kept, frame, tables, place, marker = list[bytes](), b"", list[tuple[int, int]](), 2, 0
    while marker != SCAN:
        start, marker, size = struct.unpack_from(">BBH", content, place)
        segment = content[place : place + 2 + size]
        place += 2 + size
        if start != 0xFF or marker not in (QUANTISATION, HUFFMAN, *FRAMES, SCAN, *SAYS_NOTHING):
            return None
        if marker not in SAYS_NOTHING:
            kept.append(segment)
        if marker in FRAMES:
            frame += segment[4:]
        elif marker in (QUANTISATION, HUFFMAN):
            tables += _tables(marker, segment[4:])
    end = re.compile(rb"\xff[^\0]").search(content, place)
    if end is None or end[0] != JPEG_END or not _is_plain(frame, kept[-1], tables):
        return None
    coded, start = content[place : end.start()], b"".join((b"\xff\xd8", JFIF, *kept))
    changed = bytes(0x55 if byte == 0xAA else byte ^ 0x55 for byte in coded[-2:])  # never 255, which is special
    pixels, new = _pixels(content), start + coded + JPEG_END
    ends_with_image = not np.array_equal(_pixels(start + coded[:-2] + changed + JPEG_END), pixels)
    return new if ends_with_image and np.array_equal(_pixels(new), pixels) else None


def _is_plain(frame: bytes, scan: bytes, tables: list[tuple[int, int]]) -> bool:
    """Whether a JPEG of 8 bits has one scan of all its colours, blocks that end where it does, and no unused table."""
    depth, height, width, number = struct.unpack_from(">BHHB", frame)
    names, samples, scales, coders = frame[6::3], frame[7::3], frame[8::3], scan[6:-3:2]
    sides = (8, 8) if number == 1 else (8 * max(s >> 4 for s in samples), 8 * max(s & 15 for s in samples))
    used = {(QUANTISATION, scale) for scale in scales}
    used |= {(HUFFMAN, table) for coder in coders for table in (coder >> 4, coder & 15 | 16)}
    return (
        (depth, number, len(scales)) in ((8, 1, 1), (8, 3, 3))
        and scan[4:] == bytes([number, *(byte for pair in zip(names, coders) for byte in pair), 0, 63, 0])
        and (width % sides[0], height % sides[1]) == (0, 0)
        and sorted(tables) == sorted(used)
    )


def _tables(kind: int, data: bytes) -> Iterator[tuple[int, int]]:
    """The kind and number of each table in a segment, which they must fill."""
    while data:
        size = 1 + (64 << (data[0] >> 4)) if kind == QUANTISATION else 17 + sum(data[1:17])
        yield kind, data[0] & 15 if kind == QUANTISATION else data[0]
        if len(data) < size:
            raise ValueError("a table is cut off")
        data = data[size:]


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)))
