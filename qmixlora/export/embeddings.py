"""The input embeddings of a run's model, whatever a lever has made of their table.

Shapes: N tokens, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qmixlora.session import Session

CHUNK = 4096  # tokens that are looked up at a time


def embedded(session: Session, ids: Sequence[int]) -> Tensor:
    """The embeddings of some tokens (N x D, in the model's dtype, on the CPU)."""
    table = session.backbone.get_input_embeddings()
    with torch.no_grad():
        rows_BND: Tensor = table(session.on_device({"ids": torch.tensor([list(ids)])})["ids"])
    return rows_BND[0].cpu()


def all_embedded(session: Session, tokenizer: Any) -> Iterator[Tensor]:
    """The embeddings of all of a tokenizer's tokens, by their numbers from 0, some at a time (N x D each).

    The numbers of a tokenizer may have gaps, and end before the model's rows or after them.
    """
    last = max(tokenizer.get_vocab().values())
    ids = range(min(1 + last, session.backbone.config.get_text_config().vocab_size))
    for start in ids[::CHUNK]:
        yield embedded(session, ids[start : start + CHUNK])
