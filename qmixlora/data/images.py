"""Image files: opened, measured, made."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from qmixlora.errors import UserError

from .formats import ImageFile


def open_images(files: Sequence[ImageFile]) -> list[Image.Image]:
    """Decode images, to RGB. Raises UserError for one that cannot be decoded."""
    images = []
    for file in files:
        try:
            with _opened(file) as image:
                images.append(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"An image cannot be read: {error}", where=str(file["path"])) from None
    return images


def image_size(file: ImageFile) -> tuple[int, int]:
    """(width, height) in pixels, read from the file's header alone."""
    with _opened(file) as image:
        width, height = image.size
        return width, height


def blank_image(size: tuple[int, int]) -> ImageFile:
    """A black image of (width, height) pixels, as a row holds one."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return {"path": None, "bytes": file.getvalue()}


def _opened(file: ImageFile) -> Image.Image:
    if file["bytes"]:
        return Image.open(io.BytesIO(file["bytes"]))
    assert file["path"] is not None, "an image has a path or bytes"
    return Image.open(file["path"])
