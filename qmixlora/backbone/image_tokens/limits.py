"""The largest picture that a model takes, as a batch, and how to have it take none that is larger.

A picture's *image tokens* are the placeholders in `input_ids` that its features replace; `data.max_image_tokens` counts
these. Around them stand a few tokens of text (begin and end of the picture, marks between tiles).

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.errors import UserError

from .families import FAMILIES, TEXT, Family

QUESTION = 4  # tokens that a sample has beside its picture, at least


def picture_batch(
    config: PretrainedConfig, rows: int, tokens: int, max_image_tokens: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(input_ids B x S, the tensors of pictures) for `rows` samples of `tokens`, each with the model's largest picture.

    The picture comes second, after one token of text, and text after it. Pixels have no values where shapes do not
    depend on them. The names are those of the family's processor.

    Raises:
        UserError: the family is not known, the picture does not fit, or nothing fits the budget.
    """
    family = _family(config, "model.id", max_image_tokens)
    picture = family.largest(config, max_image_tokens, tokens)
    count = len(picture.ids_L)
    if tokens < count + QUESTION:
        smallest = family.smallest(config)
        or_less = (
            f", or set data.max_image_tokens (at least {smallest} here)"
            if smallest < picture.ids_L.count(config.image_token_id)
            else ""
        )
        raise UserError(
            f"{tokens} tokens do not hold a picture of {count} and a question.",
            where="data.max_length or --tokens",
            fix=f"Plan with at least {count + QUESTION}{or_less}.",
        )
    ids_BS = torch.full((rows, tokens), TEXT)
    ids_BS[:, 1 : 1 + count] = torch.tensor(picture.ids_L)
    tensors = {name: torch.cat([tensor] * rows) for name, tensor in picture.tensors.items()}
    if family.kinds is not None:
        tensors[family.kinds] = (ids_BS == config.image_token_id).long()
    return ids_BS, tensors


def limit_pictures(processor: ProcessorMixin | None, config: PretrainedConfig, max_image_tokens: int | None) -> None:
    """Set the processor, and the model's config where it must agree, so that no picture takes more image tokens.

    Does nothing without a budget. Where the processor has a lower limit already, that one stays.

    Raises:
        UserError: the family is not known, or its pictures cannot be that small.
    """
    if max_image_tokens is not None:
        _family(config, "data.max_image_tokens", max_image_tokens).limit(processor, config, max_image_tokens)


def _family(config: PretrainedConfig, where: str, budget: int | None) -> Family:
    """The family of a model, whose pictures can keep to the budget."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    kind = tower if tower == "pixtral" else config.model_type  # in LLaVA's frame, but with pictures of any size
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"How many tokens the pictures of {kind!r} models take is not known.",
            where=where,
            fix=f"Known are: {', '.join(FAMILIES)}.",
        )
    if budget is not None and budget < (smallest := family.smallest(config)):
        raise UserError(
            f"A picture takes at least {smallest} tokens in this model; it cannot be held to {budget}.",
            where="data.max_image_tokens",
            fix=f"Set it to {smallest} or more, or leave it out.",
        )
    return family
