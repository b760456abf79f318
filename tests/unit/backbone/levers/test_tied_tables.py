"""lm_head and input embeddings that are one tensor, quantised together: one table for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qmixlora.backbone import load_backbone
from qmixlora.recipe import Model, Recipe
from tests.backbones import save_llava

from .helpers import CPU, META, meta_model, step

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A random LLaVA whose head is its embeddings."""
    return save_llava(tmp_path_factory.mktemp("tied"), processor, layers=2, width=64, tied=True)


@KINDS
def test_one_table_serves_both_and_nothing_is_left_in_16_bits(kind: str, tied: Path) -> None:
    """By either of the two keys."""
    for key in ("quantize_lm_head", "quantize_embeddings"):
        spec = Model(id=str(tied), dtype="float32", **{key: kind})  # type: ignore[arg-type]  # one of two names
        model, _, _ = load_backbone(spec)
        embedding: Any = model.get_input_embeddings()
        words, width = embedding.num_embeddings, embedding.embedding_dim
        assert not any(p.shape == (words, width) for p in model.parameters())
        held = [buffer for name, buffer in model.named_buffers() if name.endswith("table.held")]
        assert len(held) == 1 and held[0].nbytes == words * width // (1 if kind == "int8" else 2)
        states_ND = torch.randn(3, width)
        rows_VD = embedding(torch.arange(words))
        assert torch.allclose(model.get_output_embeddings()(states_ND), states_ND @ rows_VD.T, atol=1e-5)


@KINDS
def test_a_step_is_that_of_a_model_with_the_dequantised_table(
    kind: str, tied: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model={"id": str(tied), "quantize_lm_head": kind})
    loss, gradients = step(recipe)

    def dequantise(spec: Model, **placement: Any) -> Any:
        model, processor, anatomy = load_backbone(spec, **placement)
        table: Any = model.get_input_embeddings()
        rows_VD = table(torch.arange(table.num_embeddings))
        model.set_input_embeddings(nn.Embedding.from_pretrained(rows_VD))
        head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False).requires_grad_(False)
        head.weight.copy_(rows_VD)
        model.set_output_embeddings(head)
        return model, processor, anatomy

    monkeypatch.setattr("qmixlora.session.load_backbone", dequantise)
    other_loss, other_gradients = step(recipe)
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-3, atol=1e-5), name
    assert abs(loss - step(make_recipe(model={"id": str(tied)}))[0]) > 1e-6


@KINDS
def test_a_step_on_meta_has_one_table_too(kind: str, tied: Path) -> None:
    model, _ = meta_model(tied, {"quantize_lm_head": kind})
    table = [b for name, b in model.named_buffers() if ".table." in name]
    assert len(table) == 2 and all(tensor.device == META for tensor in table)
    assert not any(tensor.device == CPU for tensor in (*model.parameters(), *model.buffers()))
