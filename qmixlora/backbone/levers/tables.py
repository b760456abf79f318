"""The embedding tables of a model: which there are, and where a recipe puts each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from qmixlora.recipe import Model

from ..anatomy import Anatomy

Precision = Literal["none", "int8", "nf4"]


@dataclass(frozen=True)
class Table:
    """An embedding of the decoder, and what a recipe does with it; `is_head`: lm_head is tied to it."""

    path: str
    lookup: nn.Embedding
    is_head: bool
    on_host: bool
    precision: Precision


def tables_of(model: PreTrainedModel, anatomy: Anatomy, spec: Model) -> list[Table]:
    """The tables in which tokens are looked up: the input embeddings, and those beside them (Gemma 4 has one with
    inputs for every layer).

    A table that is lm_head too stays on the device, and is quantised with it.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = tuple(f"{path}." for path in anatomy.layers)
    paths = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and (module is embedding or (name.startswith(f"{anatomy.language}.") and not name.startswith(inside)))
    }
    tables = []
    for path, lookup in paths.items():
        is_head = lookup is embedding and _is_tied(embedding, head)
        precision = spec.quantize_embeddings
        if is_head and precision == "none":
            precision = spec.quantize_lm_head
        on_host = spec.offload_embeddings and not is_head
        tables.append(Table(path, lookup, is_head, on_host, "none" if on_host else precision))
    return tables


def _is_tied(embedding: Any, head: Any) -> bool:
    return head is not None and head.weight is embedding.weight
