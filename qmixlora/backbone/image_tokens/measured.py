"""Image tokens of any other family, measured with its own processor on blank images of many shapes."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.errors import UserError

from .family import Family, ImageInput

RATIOS = (1.0, 0.5, 2.0, 0.25, 4.0, 1 / 3, 3.0, 0.4, 2.5)
# of photographs, and of grids of tiles that none of these fills
MORE = [side for ratio in (4 / 3, 3 / 2, 5 / 3, 16 / 9, 7 / 2, *range(5, 13)) for side in (ratio, 1 / ratio)]
# width, height
SIZES = [(int(edge * ratio**0.5), int(edge / ratio**0.5)) for edge in (1600, 448, 48, 34) for ratio in RATIOS]
SIZES += [(int(1600 * ratio**0.5), int(1600 / ratio**0.5)) for ratio in MORE] + [(1, 1)]
Change = Callable[[Any, PretrainedConfig], None]  # of an image processor, and of a config that has to agree
KINDS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
SWITCHES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")  # cut an image into tiles
NUMBERS = (
    "max_patches",
    "max_tiles",
    "max_crops",
    "max_image_tokens",
    "max_soft_tokens",
    "max_num_patches",
    "max_pixels",
)
STEPS = 16  # of a setting, from its own value down


def placeholder_of(config: PretrainedConfig) -> int:
    """The id of image tokens. Raises UserError where the config has none under a name that is known."""
    names = ("image_token_id", "image_token_index", "image_patch_id")
    token = next((own for name in names if (own := getattr(config, name, None)) is not None), None)
    if token is None:
        raise UserError(
            f"The config of {config.model_type!r} models does not say which token stands for an image.",
            where=f"config.json: none of {', '.join(names)}",
            fix="Use a model of another family, such as Qwen/Qwen3-VL-8B-Instruct.",
        )
    return int(token)


class Measured(Family):
    """A family that only its processor knows. `limit` turns the settings of its image processor down, one at a time,
    until the measured image tokens keep to the budget, and keeps the setting that leaves the most of them.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def smallest(self, config: PretrainedConfig) -> int:
        most = _Counter(self.processor, config)
        smallest = most()
        for whole in (False, True):
            for name, values in _numbers(self.processor.image_processor, config).items():
                least = (most.after(_change(whole, name, value), smallest) for value in reversed(values))
                smallest = min(smallest, next((count for count in least if count is not None), smallest))
            smallest = min(smallest, most.after(_change(whole, None, None), smallest) or smallest)
        return smallest

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        processor, own = self.processor, config
        if budget is not None:
            processor, own = copy.deepcopy(processor), copy.deepcopy(config)
            self.limit(processor, own, budget)
        size = _Counter(processor, config).largest_size()
        inputs, two = _asked(processor, size), _asked(processor, size, count=2)
        ids_S = inputs.pop("input_ids")[0]
        image = (ids_S == placeholder_of(config)).nonzero()[:, 0]
        self.kinds = tuple(name for name in KINDS if name in inputs)
        ids_L = ids_S[int(image.min()) : int(image.max()) + 1].tolist()  # the frame around it is a few tokens more
        given = {name: value for name, value in inputs.items() if name not in (*KINDS, "attention_mask")}
        values = {name: value for name, value in given.items() if isinstance(value, Tensor | list)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        along = {name: _grown(value, two[name]) for name, value in tensors.items()}
        for name, value in tensors.items():
            if value.shape[1:2] == ids_S.shape:  # of every token, as of the last (what Llama 3.2 reads through a mask)
                values[name] = value[:, -1:].repeat(1, tokens, *[1] * (value.dim() - 2))
        return ImageInput(ids_L, values, along)

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is None or (most := _Counter(processor, config))(budget) <= budget:
            return
        after = cache(lambda change: most.after(change, budget))
        fitting: dict[int, Change] = {}
        for whole in (False, True):
            for name, values in _numbers(processor.image_processor, config).items():
                changes = [_change(whole, name, value) for value in values]
                # images get no larger from one value to the next
                index = bisect_left(changes, True, key=lambda change: _fits(after(change), budget))
                for change in changes[index:]:  # some values are none that the processor takes
                    if (count := after(change)) is not None:
                        fitting.setdefault(count, change)
                        break
            change = _change(whole, None, None)
            if (count := after(change)) is not None and count <= budget:
                fitting.setdefault(count, change)
        assert fitting, "no budget is under the smallest"
        fitting[max(fitting)](processor.image_processor, config)


def _fits(count: int | None, budget: int) -> bool:
    return count is None or count <= budget


class _Counter:
    """Counts the image tokens that a processor gives; by its own account (`_get_num_multimodal_tokens`) where that is
    right, else from blank images.
    """

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        self.processor, self.config = processor, config
        self.tells = False
        self.tells = all(self._told(size) == self._counted(size) for size in SIZES[9:11])

    def __call__(self, budget: float = math.inf) -> int:
        """The most of any image; where one has more than the budget, as many as the first such one."""
        most = 0
        for size in SIZES:
            most = max(most, self.count(size))
            if most > budget:
                break
        return most

    def after(self, change: Change, budget: int) -> int | None:
        """As a call after a change of the processor; None where it does not work so."""
        other = copy.copy(self)
        other.processor, other.config = copy.deepcopy(self.processor), copy.deepcopy(self.config)
        change(other.processor.image_processor, other.config)
        try:
            other._counted(SIZES[9])  # what is told need not be what is taken
            return other(budget)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, IndexError, KeyError):  # each in its own way
            return None

    def largest_size(self) -> tuple[int, int]:
        return max(SIZES, key=self.count)

    def count(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height)."""
        if self.tells and (told := self._told(size)) is not None:
            return told
        return self._counted(size)

    def _told(self, size: tuple[int, int]) -> int | None:
        try:
            told: Any = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])  # type: ignore[attr-defined]
            return int(told["num_image_tokens"][0])
        except (AttributeError, TypeError, ValueError, KeyError):
            return None

    def _counted(self, size: tuple[int, int]) -> int:
        return int((_asked(self.processor, size)["input_ids"] == placeholder_of(self.config)).sum())


def _grown(one: Tensor, two: Tensor) -> int:
    """The dimension along which a second image was added."""
    return next((dim for dim, (own, more) in enumerate(zip(one.shape, two.shape, strict=True)) if more != own), 0)


def _asked(processor: ProcessorMixin, size: tuple[int, int], count: int = 1) -> dict[str, Any]:
    """A question about a blank image of (width, height), as the processor makes it; `count` times."""
    content: Any = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = _blank(size)
    # by sample, or (where a processor refuses that) one after the other
    for images in ([[image]] * count, [image] * count):
        try:
            return dict(processor(text=[text] * count, images=images, return_tensors="pt"))
        except ValueError as error:
            refusal = error
    raise refusal


@cache
def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def _numbers(images: Any, config: PretrainedConfig) -> dict[str, Sequence[Any]]:
    """Settings that bound an image, with the values to try, from the largest to the least."""
    values: dict[str, Sequence[Any]] = {}
    for name in NUMBERS:
        if isinstance(own := getattr(images, name, None), int) and not isinstance(own, bool) and own > 1:
            tried = {round(own * factor**step) for step in range(STEPS) for factor in (0.7, 0.5)}
            values[name] = sorted({max(1, value) for value in tried}, reverse=True)
    size = getattr(images, "size", None)
    if size is not None and (edge := dict(size).get("longest_edge")):
        values["longest_edge"] = [round(edge * 0.7**step) for step in range(STEPS)]
    if pinpoints := getattr(config, "image_grid_pinpoints", None):
        by_area = sorted(pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])
        values["image_grid_pinpoints"] = [by_area[:count] for count in range(len(by_area), 0, -1)]
    return values


def _change(whole: bool, name: str | None, value: Any) -> Change:
    """A setting with another value; `whole`: and images are not cut into tiles."""

    def apply(images: Any, config: PretrainedConfig) -> None:
        for switch in SWITCHES if whole else ():
            if hasattr(images, switch):
                setattr(images, switch, False)
        if name == "longest_edge":
            size = {edge: min(length, value) for edge, length in dict(images.size).items() if length is not None}
            if size.get("shortest_edge") == value:  # both are areas: small images are scaled up, and rounded up
                size["shortest_edge"] = max(1, value // 4)
            images.size = type(images.size)(**size) if not isinstance(images.size, dict) else size
        elif name is not None:
            setattr(images, name, value)
            if name == "image_grid_pinpoints":
                config.image_grid_pinpoints = value

    return apply
