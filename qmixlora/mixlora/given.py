"""What a caller tells of a batch beside the model's own inputs, and what of it is about one forward pass.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .inputs import width_of
from .segments import Tasks, columns


@dataclass(frozen=True)
class Given:
    """What a caller tells of a batch beside the model's own inputs; see `routed_as`."""

    tasks: Tasks | None = None
    segments: Tensor | None = None
    routing_mask: Tensor | None = None
    prompt_width: int | None = None  # the columns of the prompt that an answer is generated for

    def taken_out_of(self, kwargs: dict[str, Any]) -> Given:
        """The same, overruled by what stands in the arguments of a forward pass, which leaves them."""
        own = {name: kwargs.pop(name, None) for name in ("tasks", "segments", "routing_mask")}
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    def of_pass(self, tokens: Tensor, start: int) -> tuple[Tensor | None, Tensor | None]:
        """(the number of every token's segment, on the host; the routing mask) of a pass (B x S x ...) over the columns
        from `start` on.

        Raises ValueError for a first pass that reads a part of the prompt alone.
        """
        if not start and self.prompt_width is not None and width_of(tokens) < self.prompt_width:
            raise ValueError(
                f"The first pass reads {width_of(tokens)} of the prompt's {self.prompt_width} tokens, and a mixture is"
                " routed on all of them at once. Leave prefill_chunk_size out."
            )
        number_BS, mask_BS = self.segments, self.routing_mask
        if number_BS is not None:
            number_BS = number_BS.cpu()
            number_BS = columns(number_BS, tokens.shape, start, number_BS.amax(dim=1, keepdim=True))
        if mask_BS is not None:
            mask_BS = mask_BS.to(tokens.device, non_blocking=True)
            mask_BS = columns(mask_BS, tokens.shape, start, torch.zeros_like(mask_BS[:, :1]))
        return number_BS, mask_BS

    def number_before(self, start: int, rows: int) -> Tensor | None:
        """The number of the segment that the last token before column `start` belongs to (B, on the host), -1 where
        there is padding alone; None where `segments` do not tell of it.
        """
        if self.segments is None or start > self.segments.shape[1]:
            return None
        return self.segments[:, :start].cpu().amax(dim=1).repeat_interleave(rows // len(self.segments))

    def check_questions(
        self, start: int, number_BS: Tensor | None, mask_BS: Tensor | None, begins_B: Tensor | None
    ) -> None:
        """Raises ValueError where a pass from column `start` on, told by `of_pass`, reads more of the questions of the
        segments that it goes on with (`begins_B`).
        """
        told = self.routing_mask
        if told is None or mask_BS is None or start >= told.shape[1]:  # what follows a prompt is its answer
            return
        goes_on_BS = mask_BS.bool().cpu()
        if number_BS is not None:
            goes_on_BS = goes_on_BS & (number_BS <= (0 if begins_B is None else begins_B[:, None]))
        if goes_on_BS.any():
            raise ValueError(
                "A pass goes on with a question whose factors were chosen from its beginning, which the cache holds."
                " Read each question in one pass: cut the cache back to the end of an answer, or run the whole prompt"
                " without past_key_values, and leave prefill_chunk_size out."
            )
