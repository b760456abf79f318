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
    "lever", [{"quantize_lm_head": "nf4"}, {"quantize_embeddings": "int8"}, {"offload_embeddings": True}]
)
def test_tied_embeddings_are_refused(lever: dict[str, Any], tmp_path: Path, processor: Any) -> None:
    save_llava(tmp_path, processor, layers=1, width=64, tied=True)
    with pytest.raises(UserError, match="one tensor") as caught:
        load_backbone(Model(id=str(tmp_path), dtype="float32", **lever))
    assert f"model.{next(iter(lever))}" in str(caught.value)


def test_more_layers_than_there_are_cannot_be_streamed(deep: Path) -> None:
    with pytest.raises(UserError, match=r"6 decoder layers.*has 5"):
        load_backbone(Model(id=str(deep), stream_layers=6))
