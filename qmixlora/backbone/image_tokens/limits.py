"""The largest images that a model takes, as a batch; and a limit on the tokens of an image.

An image's *image tokens* are the placeholders in `input_ids` that its features replace; `data.max_image_tokens` counts
these. Around them stand a few tokens of text (begin and end of the image, marks between tiles).

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.errors import UserError

from .families import family_of
from .family import TEXT
from .measured import placeholder_of

QUESTION = 4  # tokens that a sample has beside its image, at least


def largest_images(
    config: PretrainedConfig,
    rows: int,
    tokens: int,
    max_image_tokens: int | None,
    processor: ProcessorMixin | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """(input_ids B x S, the tensors of images) for `rows` samples of `tokens`, each with the model's largest image.

    The image comes second, after one token of text, and text after it. Pixels have no values where shapes do not
    depend on them. The names are those of the family's processor. A family that is not known is measured with
    `processor`, where there is one.

    Raises:
        UserError: the family is not known, the image does not fit, or nothing fits the budget.
    """
    family, placeholder = family_of(config, "model.id", max_image_tokens, processor), placeholder_of(config)
    image = family.largest(config, max_image_tokens, tokens)
    count = len(image.ids_L)
    if tokens < count + QUESTION:
        smallest = family.smallest(config)
        or_less = (
            f", or set data.max_image_tokens (at least {smallest} here)"
            if smallest < image.ids_L.count(placeholder)
            else ""
        )
        raise UserError(
            f"{tokens} tokens do not hold an image of {count} and a question.",
            where="data.max_length or --tokens",
            fix=f"Plan with at least {count + QUESTION}{or_less}.",
        )
    ids_BS = torch.full((rows, tokens), TEXT)
    ids_BS[:, 1 : 1 + count] = torch.tensor(image.ids_L)
    tensors: dict[str, Any] = {
        name: value * rows if isinstance(value, list) else torch.cat([value] * rows, dim=image.along.get(name, 0))
        for name, value in image.tensors.items()
    }
    tensors |= {name: (ids_BS == placeholder).long() for name in family.kinds}
    return ids_BS, tensors


def limit_image_tokens(
    processor: ProcessorMixin | None, config: PretrainedConfig, max_image_tokens: int | None
) -> None:
    """Set the processor, and the model's config where it must agree, so that no image takes more image tokens.

    Does nothing without a budget. Where the processor has a lower limit already, that one stays.

    Raises:
        UserError: the family is not known, or its images cannot be that small.
    """
    if max_image_tokens is not None:
        family = family_of(config, "data.max_image_tokens", max_image_tokens, processor)
        family.limit(processor, config, max_image_tokens)
