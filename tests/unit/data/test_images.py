"""Images are opened, measured and made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmixlora.data import Collator, load_conversations
from qmixlora.data.formats import ImageFile
from qmixlora.data.images import blank_image, image_size, open_images
from qmixlora.errors import UserError

from .helpers import GPT, HUMAN, Write


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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_are_opened_in_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "i.png")
    [opened] = open_images([{"path": str(tmp_path / "i.png"), "bytes": None}])
    assert opened.mode == "RGB" and opened.size == (4, 3)


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
