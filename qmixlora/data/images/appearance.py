"""What a viewer shows of an image that Pillow has opened: upright, on white, in eight bits of red, green and blue."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ExifTags import Base

APPEARANCE_VERSION = 2  # of `as_seen`; whoever keeps what was made of images keeps this beside it
TURNS = {  # EXIF orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = range(5, 9)  # the orientations that exchange width and height
WHITE = (255, 255, 255)
MAY_BE_TRANSPARENT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"}
WIDE = 16  # bits of a grey image in Pillow's mode I where the format has no more
WIDE_FORMATS = {"PNG", "PPM"}
PHOTOMETRIC = 262  # TIFF's tag; 0 is white at zero


def size_as_seen(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of what `as_seen` gives, from the header alone."""
    width, height = image.size
    return (height, width) if _orientation(image) in ON_ITS_SIDE else (width, height)


def as_seen(image: Image.Image) -> Image.Image:
    """Decode the first frame of an image that has just been opened, to RGB.

    The image is turned as its EXIF orientation says. What is transparent, or outside of a GIF's first frame, is white.
    Grey of more than eight bits is scaled from what its depth can hold; 32-bit integers from the depth, 8 or 16 bits,
    that holds them all; floats from 0..1 if that holds them all. All other numbers are scaled from their lowest
    (black) to their highest (white). Colour profiles are left aside, as the models' own training did.

    Raises whatever Pillow and its plugins raise for a broken body.
    """
    orientation, depth, covered = _orientation(image), _depth(image), _covered(image)
    image.load()
    if image.mode.startswith(("I", "F")):
        seen = _scaled(image, depth)
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        made: Any = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        seen = made
    elif image.mode in MAY_BE_TRANSPARENT and image.has_transparency_data:
        _deepen_transparency(image, depth)
        seen = _on_white(image.convert("RGBA"))
    else:
        seen = image.convert("RGB")
    if covered is not None:
        whole = Image.new("RGB", seen.size, WHITE)
        whole.paste(seen.crop(covered), covered)
        seen = whole
    return seen.transpose(TURNS[orientation]) if orientation in TURNS else seen


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read, as viewers have it."""
    if image.format == "TIFF":  # Pillow sets these upright by itself, and their size too
        return 1
    try:
        # not the PNG's own method, which decodes the body to look for what may stand behind it
        orientation = Image.Image.getexif(image).get(Base.Orientation)
    except Exception:  # a broken EXIF block raises nearly everything
        return 1
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def _depth(image: Image.Image) -> int | None:
    """The bits of a sample in the file, where Pillow's decoder names them, as in `I;16B`. Known before decoding."""
    for tile in getattr(image, "tile", []):
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if arguments and (bits := re.search(r";(\d+)", str(arguments[0]))):
            return int(bits[1])
    return None


def _covered(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of a GIF's first frame, if it leaves something of the image out. Known before decoding."""
    if image.format != "GIF" or not image.tile:  # type: ignore[attr-defined]
        return None
    left, top, right, bottom = image.tile[0].extents  # type: ignore[attr-defined]
    return None if (left, top, right, bottom) == (0, 0, *image.size) else (left, top, right, bottom)


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image on a white ground, in RGB."""
    ground = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _deepen_transparency(image: Image.Image, depth: int | None) -> None:
    """Scale the one colour that a PNG calls transparent as its samples were scaled: Pillow leaves it in their depth."""
    colour = image.info.get("transparency")
    if image.mode not in {"L", "RGB"} or depth in {None, 8} or colour is None or image.format != "PNG":
        return
    assert depth is not None

    def in_eight_bits(value: int) -> int:
        return value >> (depth - 8) if depth > 8 else value * 255 // (2**depth - 1)

    image.info["transparency"] = (
        tuple(map(in_eight_bits, colour)) if isinstance(colour, tuple) else in_eight_bits(colour)
    )


def _scaled(image: Image.Image, depth: int | None) -> Image.Image:
    """A grey image of integers of more than eight bits or of floats (modes I;16, I, F), scaled as `as_seen` says."""
    numbers: NDArray[Any] = np.asarray(image)
    if image.mode.startswith("I;"):
        low, high = 0.0, float(2 ** (depth or WIDE) - 1)
    elif image.mode == "I" and image.format in WIDE_FORMATS:
        low, high = 0.0, float(2**WIDE - 1)
    else:
        low, high = _range(numbers)
    shares = np.clip((numbers.astype(np.float32) - low) / (high - low), 0, 1)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0 and image.mode.startswith("I;"):
        shares = 1 - shares  # Pillow inverts eight bits alone
    grey = (np.nan_to_num(shares) * 255 + 0.5).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[numbers == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _range(numbers: NDArray[Any]) -> tuple[float, float]:
    """What is black and what is white, for numbers of no known depth."""
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    held = (1.0,) if numbers.dtype.kind == "f" else (255.0, 65535.0)
    for most in held:
        if low >= 0 and high <= most:
            return 0.0, most
    return (low, high) if high > low else (0.0, 1.0)
