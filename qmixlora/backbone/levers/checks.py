"""Levers that a model does not have."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from ..anatomy import Anatomy
from ..nf4 import BLOCK


def check_levers(model: PreTrainedModel, anatomy: Anatomy, spec: Model) -> None:
    """Refuse memory levers that this model does not have (weights may be on meta).

    Raises:
        UserError: the embeddings are tied to lm_head, and one of the two is to lie elsewhere or in another precision;
            the embedding is of a kind that is not quantised; or more layers are to be streamed than there are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    levers = {
        "quantize_lm_head": spec.quantize_lm_head != "none",
        "quantize_embeddings": spec.quantize_embeddings != "none",
        "offload_embeddings": spec.offload_embeddings,
    }
    for name, pulled in levers.items():
        if pulled and head is not None and head.weight is embedding.weight:
            raise UserError(
                "This model's lm_head and input embeddings are one tensor, which is needed on the card in 16 bits.",
                where=f"model.{name}",
                fix="Leave quantize_lm_head, quantize_embeddings and offload_embeddings out; model.stream_layers and"
                " train.loss_chunk save memory in this model too.",
            )
    if levers["quantize_lm_head"] and type(head) is not nn.Linear:
        raise UserError(f"lm_head is a {type(head).__name__}, which is not quantised.", where="model.quantize_lm_head")
    if levers["quantize_embeddings"]:
        _check_embedding(embedding, spec)
    layers = len(anatomy.layers)
    if spec.stream_layers > layers:
        raise UserError(
            f"{spec.stream_layers} decoder layers are to be streamed, and the model has {layers}.",
            where="model.stream_layers",
            fix=f"Set it to {layers} or less.",
        )


def _check_embedding(embedding: nn.Module, spec: Model) -> None:
    if type(embedding) is not nn.Embedding:
        raise UserError(
            f"The input embedding is a {type(embedding).__name__}, which is not quantised.",
            where="model.quantize_embeddings",
            fix="Use model.offload_embeddings: true.",
        )
    if spec.quantize_embeddings == "nf4" and embedding.embedding_dim % BLOCK:
        raise UserError(
            f"The rows of the input embeddings have {embedding.embedding_dim} numbers, not whole blocks of {BLOCK}.",
            where="model.quantize_embeddings",
            fix="Use int8.",
        )
