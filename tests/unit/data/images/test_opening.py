"""Images are opened, measured and made."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmixlora.data import Collator, load_conversations
from qmixlora.data.formats import ImageFile
from qmixlora.data.images.opening import blank_image, check_body, check_header, image_size, open_images
from qmixlora.errors import UserError

from ..helpers import GPT, HUMAN, Write
from ..image_writing import encoded, icon, png


@pytest.fixture
def file(tmp_path: Path, image: str) -> ImageFile:
    return {"path": str(tmp_path / image), "bytes": None}


@pytest.fixture
def inside(tmp_path: Path, image: str) -> ImageFile:
    """The same image as bytes, under a path that leads nowhere, as parquet files have them."""
    return {"path": "nowhere.png", "bytes": (tmp_path / image).read_bytes()}


def test_an_image_is_the_same_from_its_path_and_from_its_bytes(file: ImageFile, inside: ImageFile) -> None:
    first, second = open_images([file, inside])
    assert np.array_equal(np.asarray(first), np.asarray(second)) and first.getpixel((0, 0)) == (200, 10, 10)


def test_the_size_is_width_and_height(file: ImageFile, inside: ImageFile) -> None:
    assert image_size(file) == image_size(inside) == (40, 30)


def test_the_size_is_read_from_the_header_alone(tmp_path: Path, file: ImageFile) -> None:
    header = Path(str(file["path"])).read_bytes()[:60]
    assert image_size({"path": None, "bytes": header}) == (40, 30)


def test_a_blank_image_has_its_size_and_is_black() -> None:
    blank = blank_image((7, 5))
    [opened] = open_images([blank])
    assert image_size(blank) == (7, 5) and not np.asarray(opened).any()


def test_an_image_with_a_good_header_and_no_body_is_named(
    write_json: Write, tmp_path: Path, image: str, processor: object
) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / image).read_bytes()[:60])
    rows = load_conversations(str(write_json("c.json", [{"image": "cut.png", "conversations": [HUMAN, GPT]}])))
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*cut\.png"):
        Collator(processor, 64)([rows[0]])


BOMB = png((20_000, 10_000), 8, 0, bytes(20_000))  # a few hundred bytes that say they are 200 million pixels


def test_an_image_of_too_many_pixels_is_refused_by_its_header(write_json: Write, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(BOMB["bytes"] or b"")
    source = str(write_json("b.json", [{"image": "bomb.png", "conversations": [HUMAN, GPT]}]))
    with pytest.raises(UserError, match=r"20000 x 10000 = 200,000,000 pixels(.|\n)*bomb\.png .named by .*row 0"):
        load_conversations(source)
    assert len(load_conversations(source, max_pixels=200_000_000)) == 1


def test_the_limit_is_the_one_that_is_given_on_either_side_of_pillows_own() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    for limit in (100, Image.MAX_IMAGE_PIXELS, 3 * Image.MAX_IMAGE_PIXELS):
        assert check_header(png((limit, 1), 8, 0, b""), limit) == (limit, 1)
        with pytest.raises(UserError, match=r"over data\.max_pixels"):
            check_header(png((limit + 1, 1), 8, 0, b""), limit)


def test_pillows_own_limit_stays_as_it_was_with_threads_at_work(file: ImageFile) -> None:
    limit, interval = Image.MAX_IMAGE_PIXELS, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            sizes = list(pool.map(image_size, [file, BOMB] * 500))
    finally:
        sys.setswitchinterval(interval)
    assert sizes == [(40, 30), (20_000, 10_000)] * 500 and limit == Image.MAX_IMAGE_PIXELS


def test_nothing_that_pillow_says_of_a_broken_file_reaches_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process that has set up no logging
    file = encoded(Image.new("L", (1, 1)), "TIFF", tiffinfo={277: 9})  # samples per pixel, more than Pillow takes
    with pytest.raises(UserError, match="no known format"):
        image_size(file)
    assert capfd.readouterr().err == ""


def test_an_icon_whose_list_is_wrong_is_as_large_as_what_it_holds() -> None:
    inside = encoded(Image.new("RGB", (500, 400)), "PNG")["bytes"] or b""
    [opened] = open_images([icon(16, inside)])
    assert opened.size == check_header(icon(16, inside)) == (500, 400)
    with pytest.raises(UserError, match="500 x 400 = 200,000 pixels"):
        check_header(icon(16, inside), 199_999)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page or an SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (b"nothing known", "no known format"),
    ],
)
def test_a_file_that_is_no_image_is_told_by_how_it_begins(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=f"no known format(.|\n)*row 7(.|\n)*{words}|{words}(.|\n)*row 7"):
        check_header({"path": "a.png", "bytes": content}, named_by="row 7")


def cut(content: bytes) -> bytes:
    return content[: len(content) * 7 // 10]


def damaged(content: bytes) -> bytes:
    return content[:-40] + bytes(20) + content[-20:]


@pytest.mark.parametrize(
    ("container", "break_"),
    [*((container, cut) for container in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")), ("PNG", damaged)],
)
def test_a_broken_body_is_found_where_it_is_decoded_and_named(container: str, break_: Callable[[bytes], bytes]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), container)
    assert check_body(whole) == (90, 90)
    broken: ImageFile = {"path": "a.parquet, row 7, bytes", "bytes": break_(whole["bytes"] or b"")}
    for check in (check_body, lambda file: open_images([file])):
        with pytest.raises(UserError, match=r"cannot be read(.|\n)*a\.parquet, row 7"):
            check(broken)


def test_what_is_read_of_an_image_is_the_same_from_a_file_that_pillow_would_map(tmp_path: Path) -> None:
    """Pillow maps plain TIFFs into memory, and takes their turned size for that of their rows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.save(tmp_path / "a.tif", exif=exif)
    [opened] = open_images([{"path": str(tmp_path / "a.tif"), "bytes": None}])
    assert np.asarray(opened)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]
