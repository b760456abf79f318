"""Image tokens of any other family, measured with its own processor on blank images of many shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from .family import Family, ImageInput

EDGES, RATIOS = (2048, 896, 448, 224, 56), (1.0, 0.5, 2.0, 0.25, 4.0)
SIZES = [(int(edge * ratio**0.5), int(edge / ratio**0.5)) for edge in EDGES for ratio in RATIOS]  # width, height
KINDS = ("mm_token_type_ids", "token_type_ids")
SWITCHES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")  # cut an image into tiles
NUMBERS = ("max_patches", "max_tiles", "max_crops", "max_image_tokens", "max_soft_tokens", "max_num_patches", "max_pixels")
STEPS = 16  # of a setting, from its own value down


def placeholder_of(config: PretrainedConfig) -> int:
    """The id of image tokens."""
    names = ("image_token_id", "image_token_index", "image_patch_id")
    return int(next(getattr(config, name) for name in names if getattr(config, name, None) is not None))


class Measured(Family):
    """A family that only its processor knows. `limit` turns the settings of its image processor down, one at a time,
    until the measured image tokens keep to the budget, and keeps the setting that leaves the most of them.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def smallest(self, config: PretrainedConfig) -> int:
        trials = (self._most(trial, config) for trial in _smallest_settings(self.processor, config))
        return min([count for count in trials if count is not None], default=self._all(self.processor, config))

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        processor, own = self.processor, config
        if budget is not None:
            processor, own = copy.deepcopy(processor), copy.deepcopy(config)
            Measured(processor).limit(processor, own, budget)
        counts = {size: count for size in SIZES if (count := self._count(processor, config, size)) is not None}
        inputs = _asked(processor, max(counts, key=lambda size: counts[size]))
        ids_S = inputs.pop("input_ids")[0]
        image = (ids_S == placeholder_of(config)).nonzero()[:, 0]
        self.kinds = next((name for name in KINDS if name in inputs), None)
        # the frame around an image is a few tokens more; they count as text here
        ids_L = ids_S[int(image.min()) : int(image.max()) + 1].tolist()
        given = {name: value for name, value in inputs.items() if name not in (*KINDS, "attention_mask")}
        return ImageInput(ids_L, {name: value for name, value in given.items() if isinstance(value, Tensor)})

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is None or self._all(processor, config) <= budget:
            return
        best: tuple[int, Callable[[Any, PretrainedConfig], None]] | None = None
        for change in _settings(processor, config):
            count = self._tried(processor, config, change)
            if count is not None and count <= budget and (best is None or count > best[0]):
                best = count, change
        assert best is not None, "no budget is under the smallest"
        best[1](processor.image_processor, config)

    def _tried(self, processor: ProcessorMixin, config: PretrainedConfig, change: Callable[..., None]) -> int | None:
        trial, own = copy.deepcopy(processor), copy.deepcopy(config)
        change(trial.image_processor, own)
        return self._most(trial, own)

    def _most(self, processor: ProcessorMixin, config: PretrainedConfig) -> int | None:
        """The most image tokens of an image; None for settings that do not work."""
        try:
            return self._all(processor, config)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, IndexError, KeyError):  # each in its own way
            return None

    def _all(self, processor: ProcessorMixin, config: PretrainedConfig) -> int:
        counts = [self._count(processor, config, size) for size in SIZES]
        known = [count for count in counts if count is not None]
        if not known:
            raise ValueError("The processor takes none of the images that were tried.")
        return max(known)

    def _count(self, processor: ProcessorMixin, config: PretrainedConfig, size: tuple[int, int]) -> int | None:
        """Image tokens of an image of (width, height); None where its shape is refused."""
        try:
            return int((_asked(processor, size)["input_ids"] == placeholder_of(config)).sum())
        except ValueError:
            return None


def _asked(processor: ProcessorMixin, size: tuple[int, int]) -> dict[str, Any]:
    """A question about a blank image of (width, height), as the processor makes it."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.new("RGB", size)
    for images in ([[image]], [image]):  # by sample, or (where a processor refuses that) one after the other
        try:
            return dict(processor(text=[text], images=images, return_tensors="pt"))
        except ValueError as error:
            refusal = error
    raise refusal


def _settings(processor: ProcessorMixin, config: PretrainedConfig) -> Iterator[Callable[[Any, PretrainedConfig], None]]:
    """Changes of an image processor that make images smaller, each alone or after images are cut into tiles no more."""
    for whole in (False, True):
        if whole and not any(getattr(processor.image_processor, name, False) for name in SWITCHES):
            return
        for name, values in _numbers(processor.image_processor, config).items():
            for value in values:
                yield _change(whole, name, value)
        yield _change(whole, None, None)


def _smallest_settings(processor: ProcessorMixin, config: PretrainedConfig) -> Iterator[ProcessorMixin]:
    for whole in (False, True):
        for name, values in {**_numbers(processor.image_processor, config), "": [None]}.items():
            for value in reversed(values):
                trial = copy.deepcopy(processor)
                _change(whole, name or None, value)(trial.image_processor, copy.deepcopy(config))
                yield trial


def _numbers(images: Any, config: PretrainedConfig) -> dict[str, Sequence[Any]]:
    """Settings that bound an image, with the values to try, from the largest to the least."""
    values: dict[str, Sequence[Any]] = {}
    for name in NUMBERS:
        if isinstance(own := getattr(images, name, None), int) and not isinstance(own, bool) and own > 1:
            values[name] = sorted({max(1, round(own * 0.7**step)) for step in range(STEPS)}, reverse=True)
    size = getattr(images, "size", None)
    if size is not None and (edge := dict(size).get("longest_edge")):
        values["longest_edge"] = [round(edge * 0.7**step) for step in range(STEPS)]
    if pinpoints := getattr(config, "image_grid_pinpoints", None):
        by_area = sorted(pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])
        values["image_grid_pinpoints"] = [by_area[:count] for count in range(len(by_area), 0, -1)]
    return values


def _change(whole: bool, name: str | None, value: Any) -> Callable[[Any, PretrainedConfig], None]:
    """A change of an image processor, and of the config where the model reads the same there."""

    def apply(images: Any, config: PretrainedConfig) -> None:
        for switch in SWITCHES if whole else ():
            if hasattr(images, switch):
                setattr(images, switch, False)
        if name == "longest_edge":
            size = {edge: min(length, value) for edge, length in dict(images.size).items() if length is not None}
            images.size = type(images.size)(**size) if not isinstance(images.size, dict) else size
        elif name is not None:
            setattr(images, name, value)
            if name == "image_grid_pinpoints":
                config.image_grid_pinpoints = value

    return apply

