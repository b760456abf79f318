"""Images look as a viewer shows them: known pixels in every mode, depth and container."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qmixlora.data.formats import ImageFile
from qmixlora.data.images.opening import image_size, open_images
from tests.unit.data.image_writing import Pixel, drawn, encoded, icon, png, tiff

BLACK, WHITE, GREY, RED, GREEN, BLUE = (
    (0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255),
)  # fmt: skip
Pixels = NDArray[np.uint8]
STORED: dict[int, Callable[[Pixels], Pixels]] = {  # orientation -> the upright image as the file holds it
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
LOSSY = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}, "MPO": {"quality": 95}}


def seen(file: ImageFile) -> list[tuple[int, ...]]:
    """The first row of an image as it is opened."""
    [image] = open_images([file])
    assert image.mode == "RGB" and image.size == image_size(file)
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


def near(pixels: list[tuple[int, ...]], expected: list[tuple[int, ...]], tolerance: int) -> bool:
    return len(pixels) == len(expected) and bool(np.abs(np.subtract(pixels, expected)).max() <= tolerance)


@pytest.mark.parametrize(
    ("container", "orientation"), list(itertools.product([*LOSSLESS, *LOSSY], STORED)), ids=lambda value: str(value)
)
def test_an_image_is_upright_whatever_its_orientation(container: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24], upright[16:, 24:] = RED, GREEN, BLUE, WHITE
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {**LOSSLESS, **LOSSY}[container]
    file = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), container, exif=exif, **options)
    [image] = open_images([file])
    assert image_size(file) == image.size == (48, 32)
    centres = [image.getpixel((x, y)) for y in (8, 24) for x in (12, 36)]
    assert near(centres, [RED, GREEN, BLUE, WHITE], 0 if container in LOSSLESS else 12)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert image_size(encoded(drawn("L", [0, 9]), "PNG", exif=exif)) == (2, 1)


def test_an_orientation_is_read_without_the_body() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(Image.new("RGB", (400, 3)), "PNG", exif=exif)
    content = file["bytes"] or b""
    assert image_size({"path": None, "bytes": content[: content.index(b"IDAT") + 4]}) == (3, 400)


@pytest.mark.parametrize(
    ("container", "mode", "pixels", "expected"),
    [
        ("PNG", "1", [0, 255], [BLACK, WHITE]),
        ("PNG", "L", [0, 128, 255], [BLACK, GREY, WHITE]),
        ("PNG", "LA", [(0, 0), (0, 255), (0, 127)], [WHITE, BLACK, GREY]),
        ("PNG", "RGB", [RED, (1, 2, 3)], [RED, (1, 2, 3)]),
        ("PNG", "RGBA", [(0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 127)], [WHITE, RED, (128, 128, 255)]),
        ("PNG", "I;16", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("WEBP", "RGBA", [(0, 0, 0, 0), (0, 0, 0, 0)], [WHITE, WHITE]),
        ("PPM", "I", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("PPM", "I", [0, 128, 255], [BLACK, BLACK, (1, 1, 1)]),
        ("TIFF", "I;16", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("TIFF", "I;16B", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("TIFF", "I;16", [0, 1, 255], [BLACK, BLACK, (1, 1, 1)]),
        ("TIFF", "I", [0, 128, 255], [BLACK, GREY, WHITE]),
        ("TIFF", "I", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("TIFF", "I", [-1000, 0, 1000], [BLACK, GREY, WHITE]),
        ("TIFF", "I", [0, 10**6, 2 * 10**6], [BLACK, GREY, WHITE]),
        ("TIFF", "I", [-7, -7], [BLACK, BLACK]),
        ("TIFF", "F", [0.0, 0.5, 1.0], [BLACK, GREY, WHITE]),
        ("TIFF", "F", [0.0, 0.25, 0.5], [BLACK, (64, 64, 64), GREY]),
        ("TIFF", "F", [0.0, 127.5, 255.0], [BLACK, GREY, WHITE]),
        ("TIFF", "F", [-3.0, 0.0, 3.0], [BLACK, GREY, WHITE]),
        ("TIFF", "F", [float("nan"), 0.0, 1.0, float("inf"), float("-inf")], [BLACK, BLACK, WHITE, WHITE, BLACK]),
        ("TIFF", "CMYK", [(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)], [RED, BLACK, WHITE]),
        ("TIFF", "LAB", [(255, 128, 128), (0, 128, 128), (136, 208, 195)], [WHITE, BLACK, RED]),
        ("TIFF", "RGBA", [(0, 0, 0, 0), (0, 255, 0, 255)], [WHITE, GREEN]),
        ("TIFF", "LA", [(0, 0), (0, 255)], [WHITE, BLACK]),
        ("JPEG", "YCbCr", [(76, 85, 255), (76, 85, 255)], [(254, 0, 0), (254, 0, 0)]),
        ("JPEG2000", "I;16", [0, 32896, 65535], [BLACK, GREY, WHITE]),
        ("JPEG2000", "RGBA", [(0, 0, 0, 0), (0, 0, 255, 255)], [WHITE, BLUE]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_of_every_mode_are_known(
    container: str, mode: str, pixels: list[Pixel], expected: list[tuple[int, ...]]
) -> None:
    if mode == "I;16B":
        image = Image.frombytes(mode, (len(pixels), 1), np.asarray(pixels, ">u2").tobytes())
    else:
        image = drawn(mode, pixels)
    tolerance = {"LAB": 12, "YCbCr": 2, "LA": 1, "RGBA": 1}.get(mode, 0)
    assert near(seen(encoded(image, container)), expected, tolerance)


PALETTE = bytes([*RED, *GREEN, *BLUE])


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png((4, 1), 2, 0, b"\x1b"), [BLACK, (85,) * 3, (170,) * 3, WHITE]),
        (png((4, 1), 2, 0, b"\x1b", tRNS=b"\0\x02"), [BLACK, (85,) * 3, WHITE, WHITE]),
        (png((2, 1), 4, 0, b"\x5a", tRNS=b"\0\x05"), [WHITE, (170,) * 3]),
        (png((2, 1), 1, 0, b"\x40", tRNS=b"\0\0"), [WHITE, WHITE]),
        (png((2, 1), 8, 0, b"\0\x64", tRNS=b"\0\0"), [WHITE, (100,) * 3]),
        (png((2, 1), 16, 0, b"\0\0\x80\x80", tRNS=b"\0\0"), [WHITE, GREY]),
        (png((2, 1), 8, 2, bytes([*RED, *BLUE]), tRNS=b"\0\xff\0\0\0\0"), [WHITE, BLUE]),
        (png((2, 1), 16, 2, b"\xff\xff" + b"\0" * 8 + b"\xff\xff", tRNS=b"\xff\xff\0\0\0\0"), [WHITE, BLUE]),
        (png((1, 1), 16, 2, b"\x80\x80\0\0\xff\xff"), [(128, 0, 255)]),
        (png((2, 1), 16, 4, b"\0\0\0\0\0\0\xff\xff"), [WHITE, BLACK]),
        (png((3, 1), 8, 3, b"\0\x01\x02", PLTE=PALETTE), [RED, GREEN, BLUE]),
        (png((3, 1), 8, 3, b"\0\x01\x02", PLTE=PALETTE, tRNS=b"\xff\0"), [RED, WHITE, BLUE]),
        (png((3, 1), 8, 3, b"\0\x01\x02", PLTE=PALETTE, tRNS=b"\x80\0"), [(255, 127, 127), WHITE, BLUE]),
        (tiff(3, 16, 1, b"\0\0\x80\x80\xff\xff"), [BLACK, GREY, WHITE]),
        (tiff(3, 16, 0, b"\0\0\x80\x80\xff\xff"), [WHITE, (127,) * 3, BLACK]),
        (tiff(2, 12, 1, b"\0\x0f\xff"), [BLACK, WHITE]),
        (tiff(3, 8, 0, b"\0\x80\xff"), [WHITE, (127,) * 3, BLACK]),
        (tiff(2, 16, 1, b"\x00\x80\xff\x7f", sample_format=2), [BLACK, WHITE]),
    ],
    ids=[
        "grey 2", "grey 2 clear", "grey 4 clear", "bit clear", "grey 8 clear", "grey 16 clear", "rgb clear",
        "rgb 16 clear", "rgb 16", "grey and alpha 16", "palette", "palette clear", "palette half clear",
        "tiff 16", "tiff 16 white at zero", "tiff 12", "tiff 8 white at zero", "tiff 16 signed",
    ],
)  # fmt: skip
def test_pixels_of_every_depth_are_known(file: ImageFile, expected: list[tuple[int, ...]]) -> None:
    assert seen(file) == expected


def test_cmyk_in_a_jpeg_is_read_as_adobe_writes_it_with_and_without_its_transform() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    plain = encoded(red, "JPEG", quality=100)["bytes"] or b""
    assert near(seen({"path": None, "bytes": plain})[:1], [RED], 3)
    marker = plain.index(b"Adobe")  # the same numbers, called YCCK: Y, Cb, Cr of the inks
    ycck = plain[: marker + 11] + b"\x02" + plain[marker + 12 :]
    inks = Image.merge("YCbCr", [Image.new("L", (1, 1), value) for value in (255, 0, 0)]).convert("RGB")
    paper = [tuple(255 - ink for ink in inks.getpixel((0, 0)))]
    assert near(seen({"path": None, "bytes": ycck})[:1], paper, 3)


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_shown(container: str) -> None:
    first, *others = (Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE))
    file = encoded(first, container, save_all=True, append_images=others)
    assert near(seen(file)[:1], [RED], 3)


def test_what_is_clear_in_a_gif_is_white() -> None:
    file = encoded(drawn("RGBA", [(0, 0, 0, 0), (255, 0, 0, 255)]), "GIF")
    assert seen(file) == [WHITE, RED]


def test_what_the_first_frame_of_a_gif_leaves_out_is_white() -> None:
    content = bytearray(encoded(drawn("RGB", [RED]), "GIF")["bytes"] or b"")
    content[6] = 3  # the width of the screen
    assert seen({"path": None, "bytes": bytes(content)}) == [RED, WHITE, WHITE]


def test_an_icon_is_the_image_that_its_list_says() -> None:
    content = encoded(Image.new("RGBA", (16, 16), (*RED, 255)), "PNG")["bytes"] or b""
    assert seen(icon(16, content)) == [RED] * 16
