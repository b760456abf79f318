"""Images of a shape that a processor refuses are named, before a batch and in one."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from qmixlora.data.formats import Conversation
from qmixlora.data.images.opening import blank_image, open_images
from qmixlora.data.images.shapes import naming_refused_images, shape_problem
from qmixlora.errors import UserError
from tests.families.variant import variants
from tests.unit.backbone.image_tokens.families import MAKERS, marked

EXTREME = [(1, 1), (3, 3), (1, 3), (4000, 16), (16, 4000), (1, 3000), (202, 1), (199, 1)]


def row_of(*sizes: tuple[int, int]) -> Conversation:
    return {"turns": [], "images": [blank_image(size) for size in sizes], "task": "t"}


@pytest.mark.parametrize("family", MAKERS)
def test_a_family_refuses_a_shape_in_a_batch_just_where_it_is_foretold(family: str) -> None:
    _, processor = MAKERS[family]()
    for size in EXTREME:
        row = row_of(size)
        foretold = shape_problem(processor, size)
        try:
            with naming_refused_images(processor, [row]):
                text = f"word {marked(processor)} word"
                processor(text=[text], images=[open_images(row["images"])], return_tensors="pt")
        except UserError as error:
            assert foretold is not None and foretold in str(error) and f"{size[0]} x {size[1]}" in foretold
        else:
            assert foretold is None, size


@pytest.mark.parametrize("name", ["pixtral", "lfm2_vl", "video_llava"])
def test_a_strip_or_a_speck_that_only_a_batch_refuses_is_foretold(name: str) -> None:
    """Pixtral tells tokens of a strip whose shorter side it scales to nothing; LFM2-VL and Video-LLaVA tell nothing."""
    processor = variants()[name].build()[1]
    refused = set()
    for size in [(15, 4000), (2, 300), (300, 2), (1, 1), (1000, 40), (40, 1000)]:
        try:
            processor.image_processor(images=open_images([blank_image(size)]), return_tensors="pt")
        except (ValueError, RuntimeError):
            refused.add(size)
        assert (shape_problem(processor, size) is not None) is (size in refused), size
    assert refused


@pytest.mark.parametrize(
    ("size", "fits"), [((1, 3000), False), ((3000, 1), False), ((1, 700), True), ((4000, 16), True)]
)
def test_a_line_that_a_processor_would_make_an_image_of_is_refused(size: tuple[int, int], fits: bool) -> None:
    """LLaVA-1.5 scales the shorter side to 336 pixels, and cuts off what is longer only then."""
    _, processor = MAKERS["llava"]()
    processor.image_processor.size = {"shortest_edge": 336}
    problem = shape_problem(processor, size)
    assert (problem is None) is fits
    assert fits or (problem is not None and "336 x 1008000" in problem)


class Broken:
    """A processor that refuses wide images, and does not say so before."""

    def __init__(self) -> None:
        self.image_processor = self

    def __call__(self, images: list[Image.Image], **options: Any) -> None:
        if any(image.width > 9 for image in images):
            raise ValueError("too wide")


def test_an_image_that_a_processor_refuses_without_notice_is_named_and_no_other() -> None:
    row = row_of((9, 9), (10, 9))
    row["images"][1]["path"] = "wide.png, named by row 7"
    with pytest.raises(UserError, match=r"10 x 9 pixels: too wide(.|\n)*wide\.png, named by row 7"):  # noqa: SIM117
        with naming_refused_images(Broken(), [row]):  # type: ignore[arg-type]
            raise ValueError("too wide")


def test_an_error_that_is_no_images_fault_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="out of order"), naming_refused_images(Broken(), [row_of((9, 9))]):  # type: ignore[arg-type]
        raise ValueError("out of order")
