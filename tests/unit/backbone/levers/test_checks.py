"""Levers that a model does not have are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmixlora.backbone import load_backbone
from qmixlora.errors import UserError
from qmixlora.recipe import Model
from tests.backbones import save_llava


@pytest.mark.parametrize(
    ("levers", "message"),
    [
        ({"offload_embeddings": True}, "one tensor, which is needed on the card"),
        ({"quantize_lm_head": "nf4", "quantize_embeddings": "int8"}, "held in one precision"),
    ],
)
def test_a_table_that_is_the_head_too_has_one_place_and_precision(
    levers: dict[str, Any], message: str, tmp_path: Path, processor: Any
) -> None:
    save_llava(tmp_path, processor, layers=1, width=64, tied=True)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(Model(id=str(tmp_path), dtype="float32", **levers))
    assert f"model.{next(iter(levers))}" in str(caught.value)


def test_more_layers_than_there_are_cannot_be_streamed(deep: Path) -> None:
    with pytest.raises(UserError, match=r"6 decoder layers.*has 5"):
        load_backbone(Model(id=str(deep), stream_layers=6))
