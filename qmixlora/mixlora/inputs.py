"""What the inputs of a forward pass tell: its tokens, which of them are padding, an image's, or a question's.

Shapes: B batch, S sequence, T cached positions and the pass' own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .segments import Segments

IGNORED = -100  # the label of every token that is not supervised


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor on a device. (`torch.tensor(numbers, device=...)` waits for all that a card has to
    do.)
    """
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def image_token_ids(config: Any) -> list[int]:
    """The ids of placeholder tokens that stand for pixels, as far as the model's config names them."""
    name = re.compile(r"(image|video|vision|img)\w*token(_id|_index)$")
    return sorted(
        {value for key, value in getattr(config, "__dict__", {}).items() if name.search(key) and isinstance(value, int)}
    )


def cached_length(inputs: dict[str, Any]) -> int:
    """How much of the sequence that a forward pass goes on with is in the key-value cache already."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """The tensor (B x S x ...) that tells the layout of a forward pass; an empty one where nothing does."""
    named = [inputs.get("input_ids"), inputs.get("inputs_embeds"), *inputs.values()]
    return next((value for value in named if isinstance(value, Tensor)), torch.empty(0))


def attended(inputs: dict[str, Any]) -> Tensor | None:
    """The tokens of a forward pass that are no padding (B x S), by its attention mask; None where there is none.

    Generation with a static cache hands on masks of queries and keys (B x 1 x S x T), of which models with a sliding
    window have two: in all of them a token that is no padding attends to itself.

    Raises ValueError for a mask that cannot be read so.
    """
    given = inputs.get("attention_mask")
    masks = [mask for mask in (given.values() if isinstance(given, dict) else [given]) if mask is not None]
    if not masks:
        return None
    mask = max(masks, key=lambda one: int(one.shape[-1]))
    start, width = cached_length(inputs), width_of(tokens_of(inputs))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -width:].bool()  # it tells of what is in a cache, too
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] < start + width:
        raise ValueError(
            f"An attention mask ({type(mask).__name__} of {tuple(mask.shape)}) does not tell padding: give routing_mask"
            " (qmixlora.routed_as)."
        )
    own_BS = mask[:, 0].diagonal(offset=start, dim1=1, dim2=2)
    return own_BS if own_BS.dtype == torch.bool else own_BS == 0


def width_of(tokens: Tensor) -> int:
    """The columns of a forward pass, whose layout these tell."""
    return tokens.shape[1] if tokens.dim() > 1 else len(tokens)


def prompt_mask(labels_BS: Tensor, attention_BS: Tensor, number_BS: Tensor | None = None) -> Tensor:
    """The tokens before the first supervised one, of the whole sample or (`number_BS`) of their segment, without
    padding (B x S).
    """
    supervised_BS = labels_BS != IGNORED
    done_BS = supervised_BS.cumsum(dim=1)
    if number_BS is not None:  # what was done before a segment began does not count
        begins_BS = number_BS.diff(dim=1, prepend=number_BS[:, :1]) != 0
        done_BS = done_BS - torch.where(begins_BS, done_BS - supervised_BS.long(), 0).cummax(dim=1).values
    return (done_BS == 0) & attention_BS.bool()


def image_mask(ids_BS: Tensor, image_ids: Sequence[int], breaks: Sequence[int] = ()) -> Tensor:
    """The tokens that stand for images (B x S): those of `image_ids`, and runs of `breaks` between two of them."""

    def among(ids: Sequence[int]) -> Tensor:
        return (ids_BS[..., None] == to_device(ids, ids_BS.device)).any(dim=-1)

    image_BS = among(image_ids)
    if not breaks:
        return image_BS
    break_BS = among(breaks) & ~image_BS
    # of every token, the last one before it and the first one after it that are no breaks
    places_S, end = torch.arange(ids_BS.shape[1], device=ids_BS.device), ids_BS.shape[1] - 1
    before_BS = torch.where(break_BS, -1, places_S).cummax(dim=1).values
    after_BS = torch.where(break_BS, end + 1, places_S).flip(1).cummin(dim=1).values.flip(1)
    between_BS = (before_BS >= 0) & (after_BS <= end)
    for neighbour_BS in (before_BS.clamp(min=0), after_BS.clamp(max=end)):
        between_BS &= image_BS.gather(1, neighbour_BS)
    return image_BS | (break_BS & between_BS)


def routing_masks(
    inputs: dict[str, Any],
    image_ids: Sequence[int],
    routing_mask_BS: Tensor | None = None,
    number_BS: Tensor | None = None,
    segments: Segments | None = None,
    image_breaks: Sequence[int] = (),
    prompt_width: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(prompt_BS, instruction_BS): tokens before the first supervised one, without padding; and the text among them.

    `routing_mask_BS` (the prompt, as the collator knows it) overrules `attention_mask` and `labels`; without it no
    column beyond `prompt_width` counts. A sample (of several segments: a segment) whose prompt has no text is routed on
    its whole prompt.
    """
    input_ids, prompt_BS = inputs.get("input_ids"), routing_mask_BS
    if prompt_BS is None:
        labels, prompt_BS = inputs.get("labels"), attended(inputs)
        tokens, start = tokens_of(inputs), cached_length(inputs)
        if prompt_BS is None and tokens.dim() > 1:
            prompt_BS = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if prompt_BS is not None and prompt_width is not None:
            column_S = torch.arange(start, start + prompt_BS.shape[1], device=prompt_BS.device)
            prompt_BS = prompt_BS & (column_S < prompt_width)
        if segments is not None and (labels is None or not segments.all_but_last_hold(labels != IGNORED)):
            raise ValueError("Several segments need routing_mask, or labels of all answers, to tell their questions.")
        if prompt_BS is not None and labels is not None:
            prompt_BS = prompt_mask(labels, prompt_BS, None if number_BS is None else number_BS.to(labels.device))
    if prompt_BS is None:
        return None, None
    prompt_BS = prompt_BS.bool()
    if input_ids is None or not image_ids:
        return prompt_BS, prompt_BS
    text_BS = prompt_BS & ~image_mask(input_ids, image_ids, image_breaks)
    return prompt_BS, torch.where(_of_instances_with(text_BS, segments), text_BS, prompt_BS)


def check_prompts(prompt_BS: Tensor | None, labels_BS: Tensor | None, segments: Segments | None) -> None:
    """Raises ValueError where answers of an instance are supervised and labels leave nothing to be its prompt."""
    if prompt_BS is None or labels_BS is None:
        return
    answered_BS = (labels_BS != IGNORED) & ~_of_instances_with(prompt_BS, segments)
    if answered_BS.any():
        sample = int(answered_BS.any(dim=1).nonzero()[0])
        raise ValueError(
            f"Sample {sample} of the batch has no token before its first supervised one: there is no question to be"
            " routed on. Set the labels of the prompt to -100, or give routing_mask, or route on 'all' or 'task'."
        )


def _of_instances_with(mask_BS: Tensor, segments: Segments | None) -> Tensor:
    """The tokens (B x S, or B x 1 for whole samples) of the instances that have a token in the mask."""
    return mask_BS.any(dim=1, keepdim=True) if segments is None else segments.holding(mask_BS)
