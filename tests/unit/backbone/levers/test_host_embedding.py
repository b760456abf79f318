"""Embeddings in host memory: the rows of the model's own lookup, and a weight that nobody moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qmixlora.backbone import load_backbone
from qmixlora.backbone.levers import HostEmbedding, host_tensors
from qmixlora.memory.simulation.account import Account
from qmixlora.memory.simulation.simulation import on_meta, simulated
from qmixlora.mixlora import device_of
from qmixlora.recipe import Model

from .helpers import CPU, META


def test_offloaded_embeddings_stay_where_they_are(deep: Path) -> None:
    model, _, _ = load_backbone(Model(id=str(deep), dtype="float32", offload_embeddings=True, quantization="none"))
    embedding: Any = model.get_input_embeddings()
    assert all("embed_tokens" not in name for name, _ in model.named_parameters())
    nn.Module.to(model, "meta")  # as Trainer would, to its device
    assert embedding.weight.device == CPU and device_of(model) == META
    assert [id(tensor) for tensor in host_tensors(model)] == [id(embedding.weight)]


def scaled_embedding() -> Gemma3TextScaledWordEmbedding:
    torch.manual_seed(0)
    return Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=2.5)


IDS = torch.tensor([[1, 10, 0], [3, 3, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_lookup_its_scale_included(dtype: torch.dtype) -> None:
    """Gemma multiplies its rows by the square root of their width."""
    lookup = scaled_embedding().to(dtype)
    expected = lookup(IDS).detach()
    rows = HostEmbedding(lookup, CPU)(IDS)
    assert rows.dtype == dtype and torch.equal(rows, expected)
    assert not torch.equal(rows, lookup.weight[IDS])


def test_rows_of_a_scaled_lookup_can_be_planned() -> None:
    with META:
        lookup = scaled_embedding()
    with simulated([], Account()):
        rows = HostEmbedding(lookup, META)(on_meta({"ids": IDS})["ids"])
    assert rows.device == META and rows.shape == (2, 3, 6)


def test_later_ids_have_rows_of_their_own() -> None:
    """Though they may lie, and be, where the last ones were."""
    lookup = scaled_embedding()
    embedding, expected = HostEmbedding(lookup, CPU), lookup.weight * 2.5
    for word in range(1, 11):
        assert torch.equal(embedding(torch.tensor([word])), expected[word : word + 1])


def test_its_size_is_the_lookups() -> None:
    embedding = HostEmbedding(scaled_embedding(), CPU)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (11, 6)


def test_nothing_of_it_is_a_parameter_or_in_a_state_dict() -> None:
    embedding = HostEmbedding(scaled_embedding(), CPU)
    assert not list(embedding.parameters()) and not embedding.state_dict()
