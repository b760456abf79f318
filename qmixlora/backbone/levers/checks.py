"""Levers that a model does not have."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from ..anatomy import Anatomy
from ..nf4 import BLOCK
from .tables import Table, tables_of


def check_levers(model: PreTrainedModel, anatomy: Anatomy, spec: Model) -> None:
    """Refuse memory levers that this model does not have (weights may be on meta).

    Raises:
        UserError: lm_head is tied to the embeddings, which are to lie elsewhere, or in another precision than it; a
            layer or table is of a kind that is not quantised; or more layers are to be streamed than there are.
    """
    tables = tables_of(model, anatomy, spec)
    _check_tied(tables, model.get_output_embeddings(), spec)
    for table in tables:
        if table.precision == "nf4" and table.lookup.embedding_dim % BLOCK:
            raise UserError(
                f"The rows of {table.path} have {table.lookup.embedding_dim} numbers, not whole blocks of {BLOCK}.",
                where="model.quantize_embeddings",
                fix="Use int8.",
            )
    layers = len(anatomy.layers)
    if spec.stream_layers > layers:
        raise UserError(
            f"{spec.stream_layers} decoder layers are to be streamed, and the model has {layers}.",
            where="model.stream_layers",
            fix=f"Set it to {layers} or less.",
        )


def _check_tied(tables: list[Table], head: Any, spec: Model) -> None:
    tied = any(table.is_head for table in tables)
    if tied and spec.offload_embeddings and len(tables) == 1:
        raise UserError(
            "This model's lm_head and input embeddings are one tensor, which is needed on the card.",
            where="model.offload_embeddings",
            fix="Leave it out; model.quantize_lm_head: int8 holds the one tensor in 8 bits.",
        )
    if tied and len({spec.quantize_lm_head, spec.quantize_embeddings} - {"none"}) > 1:
        raise UserError(
            "This model's lm_head and input embeddings are one tensor, which is held in one precision.",
            where="model.quantize_lm_head",
            fix="Leave quantize_embeddings out, or set both to the same.",
        )
    if spec.quantize_lm_head != "none" and (type(head) is not nn.Linear or (tied and head.bias is not None)):
        raise UserError(f"lm_head is a {type(head).__name__}, which is not quantised.", where="model.quantize_lm_head")
