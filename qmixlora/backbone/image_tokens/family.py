"""The facts of one family of models: the tokens and tensors of one image, and the limit that keeps it small.

Shapes: L tokens of an image with its marks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

TEXT = 1  # a token that stands for any text


@dataclass(frozen=True)
class ImageInput:
    """One image as the processor gives it: L token ids, and its tensors (or lists, with an entry for every image), of
    which a batch is the concatenation, along the first dimension if it is not said (`along`).
    """

    ids_L: list[int]
    tensors: Mapping[str, Tensor | list[Any]]
    along: Mapping[str, int] = field(default_factory=dict)


class Family(ABC):
    """The facts of one family. `kinds` names the processor's tensors with 1 where an image token is."""

    kinds: tuple[str, ...] = ()

    @abstractmethod
    def smallest(self, config: PretrainedConfig) -> int:
        """The least `max_image_tokens` that this model's images can keep to."""

    @abstractmethod
    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        """The image with the most image tokens: within the budget, or by the processor's default without one."""

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        """Set the processor (and the config, where the model reads it there) so that no image is over the budget.

        Images of one size are as small as they can be.
        """
        return
