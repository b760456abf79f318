"""Image files that Pillow does not write itself, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

from qmixlora.data.formats import ImageFile

Pixel = int | float | tuple[int, ...]


def encoded(image: Image.Image, container: str, **options: Any) -> ImageFile:
    """An image as a file of a container, as a row holds one."""
    file = io.BytesIO()
    image.save(file, container, **options)
    return {"path": None, "bytes": file.getvalue()}


def drawn(mode: str, pixels: list[Pixel]) -> Image.Image:
    """An image of a mode, one pixel high."""
    image = Image.new(mode, (len(pixels), 1))
    for column, pixel in enumerate(pixels):
        image.putpixel((column, 0), pixel)
    return image


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, kind: int, row: bytes, **chunks: bytes) -> ImageFile:
    """A PNG whose rows are all the same; `kind` is PNG's colour type, `chunks` stand before the pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    extra = b"".join(_chunk(name.encode(), content) for name, content in chunks.items())
    body = _chunk(b"IDAT", zlib.compress((b"\0" + row) * min(size[1], 8)))  # a bomb needs no body
    return {"path": None, "bytes": b"\x89PNG\r\n\x1a\n" + header + extra + body + _chunk(b"IEND", b"")}


def tiff(width: int, depth: int, photometric: int, row: bytes, sample_format: int = 1) -> ImageFile:
    """A grey TIFF of one row, uncompressed and little-endian."""
    values = {
        256: width, 257: 1, 258: depth, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row),
        339: sample_format,
    }  # fmt: skip
    row += b"\0" * (len(row) % 2)
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + tags + b"\0\0\0\0"
    return {"path": None, "bytes": b"II*\0" + struct.pack("<I", 8 + len(row)) + row + directory}


def icon(listed: int, content: bytes) -> ImageFile:
    """A Windows icon of one PNG, which its list says to have so many pixels on a side."""
    entry = struct.pack("<BBBBHHII", listed, listed, 0, 0, 1, 32, len(content), 22)
    return {"path": None, "bytes": struct.pack("<HHH", 0, 1, 1) + entry + content}
