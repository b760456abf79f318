"""Image files: the one place that opens them, for training, planning, evaluation and chat alike."""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from qmixlora.data.formats import ImageFile
from qmixlora.errors import UserError
from qmixlora.recipe import MAX_PIXELS

from .appearance import as_seen, size_as_seen

# Formats that Pillow names without a decoder for them, or that run a program which data may drive (EPS: Ghostscript).
NOT_OPENED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SHOWN = 200  # characters of what another library says
BEGINNINGS = {  # of files that stand where an image should, and what helps
    b"version https://git-lfs": "It is a Git LFS pointer; fetch the files themselves with 'git lfs pull'.",
    b"<": "It is text, such as a web page or an SVG; download or convert the image itself.",
    b"%!PS": "It is PostScript; convert it to PNG.",
    b"%PDF": "It is a PDF; convert its pages to PNG.",
}
SOONER = "data.check_images: full looks at all images, whole, before the first step."
HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")  # from the fifth byte on
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it writes of broken files where nothing else is set up

# Pillow's limit and Python's filter of warnings are the process's own, so one thread at a time opens images (loaders
# and surveys are processes). None is forked while another thread is at it: the lock's copy would stay shut.
_ALONE = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_ALONE.acquire, after_in_parent=_ALONE.release, after_in_child=_ALONE.release)


def open_images(files: Sequence[ImageFile], *, named_by: str = "") -> list[Image.Image]:
    """Decode images to RGB, as a viewer shows them (see `as_seen`). Raises UserError as `check_body`.

    Their pixels are not counted here: `check_header` did, when the rows were read.
    """
    return [_decoded(file, named_by, SOONER if named_by else "") for file in files]


def image_size(file: ImageFile) -> tuple[int, int]:
    """(width, height) in pixels of the image as `open_images` gives it, from the file's header alone.

    Raises UserError if that cannot be read.
    """
    with _opened(file) as image:
        return size_as_seen(image)


def check_header(file: ImageFile, max_pixels: int = MAX_PIXELS, *, named_by: str = "") -> tuple[int, int]:
    """`image_size`, of an image that may be decoded. `named_by` is the row that names it, for messages.

    Raises UserError, with the file and the row: it cannot be opened, is no image, or has over `max_pixels` pixels.
    """
    with _opened(file, named_by) as image:
        width, height = size_as_seen(image)
        if width * height > max_pixels:
            raise UserError(
                f"An image has {width} x {height} = {width * height:,} pixels, over data.max_pixels, {max_pixels:,}.",
                where=_place(file, named_by),
                fix="Scale the image down, remove the sample, or raise data.max_pixels.",
            )
        return width, height


def check_body(file: ImageFile, max_pixels: int = MAX_PIXELS, *, named_by: str = "") -> tuple[int, int]:
    """Decode an image and forget it. Returns its size and raises UserError as `check_header`, and for a broken body."""
    size = check_header(file, max_pixels, named_by=named_by)
    _decoded(file, named_by)
    return size


def blank_image(size: tuple[int, int]) -> ImageFile:
    """A black image of (width, height) pixels, as a row holds one."""
    return {"path": None, "bytes": _blank_png(size)}


@lru_cache(maxsize=64)
def _blank_png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def _decoded(file: ImageFile, named_by: str = "", hint: str = "") -> Image.Image:
    with _opened(file, named_by, hint) as image:
        return as_seen(image)


@contextmanager
def _opened(file: ImageFile, named_by: str = "", hint: str = "") -> Iterator[Image.Image]:
    """An image with its header read. What goes wrong with it, in the block too, is a UserError with its place."""
    place = _place(file, named_by)
    try:
        with _ALONE, warnings.catch_warnings(), _content(file) as content:
            warnings.simplefilter("ignore")
            with _open(content, place) as image:
                yield image
    except UserError:
        raise
    except Exception as error:  # Pillow and its plugins raise nearly everything for a broken file
        fix = f"Replace the file, or remove the sample. {hint}".rstrip()
        raise UserError(f"An image cannot be read: {_reason(error)}.", where=place, fix=fix) from None


def _content(file: ImageFile) -> BinaryIO:
    """The file's content. Pillow never gets the path: it would map some files, and garble TIFFs that it turns too."""
    if file["bytes"] is not None:
        return io.BytesIO(file["bytes"])
    assert file["path"] is not None, "an image has a path or bytes"
    return Path(file["path"]).open("rb")


def _open(content: BinaryIO, place: str) -> Image.Image:
    """Read the header, of any size: our own limit is looked at with the size at hand, Pillow's says neither."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(content, formats=_formats())
    except UnidentifiedImageError:
        content.seek(0)
        advice = _advice(content.read(64))
        raise UserError("An image cannot be read: it is in no known format.", where=place, fix=advice) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_OPENED)


def _place(file: ImageFile, named_by: str) -> str:
    """Where an image is: its file, or for bytes what the data calls them, and the row that names it."""
    place = shown(file["path"] or "bytes without a name")
    return f"{place} (named by {named_by})" if named_by else place


def shown(text: Any) -> str:
    """A name for a message: short, and without anything that a terminal would not print."""
    whole = str(text)
    cut = whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}... ({len(whole):,} characters)"
    return cut if cut.isprintable() else ascii(cut)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    said = shown(error).rstrip(".")
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}".rstrip(": ")


def _advice(start: bytes) -> str:
    """What helps with a file in no known format, by how it begins."""
    if start[4:12] in HEIF:
        return "It is HEIF, as phones write it; convert it to JPEG."
    known = (advice for beginning, advice in BEGINNINGS.items() if start.lstrip().startswith(beginning))
    return next(known, "Replace it by an image, such as PNG or JPEG.")
