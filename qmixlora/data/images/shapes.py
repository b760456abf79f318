"""Images of a shape that a model's processor refuses, or that it would scale beyond all measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import ProcessorMixin

from qmixlora.data.formats import Conversation, ImageFile
from qmixlora.errors import UserError
from qmixlora.recipe import MAX_PIXELS

from .opening import blank_image, image_size, open_images, shown

STRIP, TINY = 20, 4  # times as long as wide, and pixels: shapes that no processor was made for
QUICK = 2**22  # scaled pixels that are processed in a moment


def shape_problem(processor: ProcessorMixin, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> str | None:
    """Why an image of (width, height) pixels does not fit a processor, as a sentence; None if it does.

    Processors of models that take any size are asked for its tokens, and refuse what they would refuse in a batch
    (Qwen-VL: one side over 200 times the other). Those that scale the shorter side to a fixed length (CLIP) refuse
    nothing, and would make an image of millions of pixels of a line; that counts as over `max_pixels`. Strips and
    specks are processed, since some processors count tokens of what they refuse (Pixtral), unless they are scaled to
    very many pixels.
    """
    width, height = size
    count = getattr(processor, "_get_num_multimodal_tokens", None)  # what vLLM asks processors
    try:
        if count is not None:
            count(image_sizes=[[height, width]])
    except (TypeError, AttributeError):
        pass  # it expects another image processor than there is
    except ValueError as error:
        return f"The model's processor refuses an image of {width} x {height} pixels: {shown(error)}."
    scaled: Any = getattr(processor.image_processor, "size", None) or {}
    edge = scaled.get("shortest_edge")
    longer = edge * max(size) // min(size) if edge and not scaled.get("longest_edge") else 0
    if longer and edge * longer > max_pixels:
        return (
            f"The model's processor would scale an image of {width} x {height} pixels to {edge} x {longer}, "
            f"over data.max_pixels, {max_pixels:,}."
        )
    is_odd = max(size) > STRIP * min(size) or min(size) < TINY
    is_quick = not longer or edge * longer <= QUICK
    return _refused(processor, blank_image(size), size) if is_odd and is_quick else None


@contextmanager
def naming_refused_images(processor: ProcessorMixin, rows: Sequence[Conversation]) -> Iterator[None]:
    """What a processor raises for an image of these rows, or for having none, as a UserError that says so. Other errors
    stay as they are.

    The images are looked at one by one, and only once something has been raised.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        if not any(row["images"] for row in rows):
            raise UserError(
                f"The model's processor takes no sample without an image: {error}",
                where="",
                fix="Show it an image with every question.",
            ) from error
        for row in rows:
            for file in row["images"]:
                if (problem := _refusal(processor, file)) is not None:
                    raise UserError(
                        problem, where=shown(file["path"] or ""), fix="Pad, crop or remove the image."
                    ) from error
        raise


def _refusal(processor: ProcessorMixin, file: ImageFile) -> str | None:
    size = image_size(file)
    if (problem := shape_problem(processor, size)) is not None:
        return problem
    return _refused(processor, file, size)


def _refused(processor: ProcessorMixin, file: ImageFile, size: tuple[int, int]) -> str | None:
    try:
        processor.image_processor(images=open_images([file]), return_tensors="pt")
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        return f"The model's processor refuses an image of {size[0]} x {size[1]} pixels: {shown(error)}."
    return None
