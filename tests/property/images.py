"""Image files as people might have them: of every mode and container, turned, cut short, damaged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

CONTAINERS: dict[str, tuple[str, ...]] = {  # a container and the modes that Pillow writes into it
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I;16B", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I", "I;16"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "ICO": ("RGB", "RGBA", "P", "L"),
    "PCX": ("1", "L", "P", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
    "DDS": ("L", "LA", "RGB", "RGBA"),
    "IM": ("1", "L", "P", "RGB", "CMYK", "I;16", "I", "F", "YCbCr"),
    "SPIDER": ("F",),
    "XBM": ("1",),
    "MSP": ("1",),
    "QOI": ("RGB", "RGBA"),
    "MPO": ("RGB", "L"),
}
TURNED = {"PNG", "JPEG", "TIFF", "WEBP", "AVIF", "MPO"}  # these hold EXIF
ORIENTATION = 0x0112


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """An image of a mode with random pixels."""
    rng = np.random.default_rng(seed)
    shape = size[::-1]
    if mode in {"I", "F", "I;16", "I;16B"}:
        most = 70000 if mode == "I" else 65535
        numbers = rng.integers(0, most, shape)
        if mode.startswith("I;"):
            raw = numbers.astype("<u2" if mode == "I;16" else ">u2").tobytes()
            return Image.frombytes(mode, size, raw)
        return Image.fromarray(numbers.astype(np.int32 if mode == "I" else np.float32))
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, shape).astype(bool))
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, size, rng.integers(0, 256, (*shape, bands), dtype=np.uint8).tobytes())
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def encoded(image: Image.Image, container: str, **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, container, **options)
    return file.getvalue()


@st.composite
def image_bytes(draw: st.DrawFn) -> bytes:
    """A whole file; of a mode and container, perhaps turned, transparent, or with more than one frame."""
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    mode = draw(st.sampled_from(CONTAINERS[container]))
    side = st.integers(16 if container == "ICO" else 1, 40)  # Pillow writes no smaller icons
    size = (draw(side), draw(side))
    seed = draw(st.integers(0, 2**16))
    options: dict[str, Any] = {}
    if container in TURNED and draw(st.booleans()):
        exif = Image.Exif()
        exif[ORIENTATION] = draw(st.integers(0, 9))
        options["exif"] = exif
    if container == "PNG" and mode in {"L", "P", "RGB", "I;16", "1"} and draw(st.booleans()):
        options["transparency"] = (3, 4, 5) if mode == "RGB" else draw(st.integers(0, 255))
    elif container in {"GIF", "WEBP", "PNG", "TIFF", "MPO"} and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [noise(mode, size, seed + 1)]}
    return encoded(noise(mode, size, seed), container, **options)


@st.composite
def damaged_bytes(draw: st.DrawFn) -> bytes:
    """A file that was cut short, or of which bytes were changed, taken out or put in."""
    content = bytearray(draw(image_bytes()))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    for _ in range(draw(st.integers(0, 6))):
        # most of what a format reads stands at its beginning
        place = draw(st.integers(0, min(len(content), draw(st.sampled_from([80, 600, len(content)])))))
        content[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(content)
