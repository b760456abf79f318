"""A model some of whose weights its checkpoint lacks, and which would be random, is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qmixlora.backbone import Anatomy, load_backbone
from qmixlora.backbone.completeness import check_complete
from qmixlora.errors import UserError
from qmixlora.recipe import Model
from tests.backbones import save_llava

PRECISIONS = ("nf4", "none")


def changed(
    source: Path, folder: Path, *, config: Callable[[Any], object] = dict, weights: Callable[[str], str | None] = str
) -> str:
    """A copy of a checkpoint with another config, and with weights of other names (None: without the weight)."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config(facts)
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    held: dict[str, Tensor] = load_file(folder / "model.safetensors")
    named = {new: value for name, value in held.items() if (new := weights(name)) is not None}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def load(folder: str, quantization: Any) -> Any:
    return load_backbone(Model(id=folder, dtype="float32", quantization=quantization))[0]


@pytest.mark.parametrize("quantization", PRECISIONS)
@pytest.mark.parametrize(
    "part", ["vision_tower", "multi_modal_projector", "layernorm", "lm_head", "embed_tokens", "layers.1.mlp"]
)
def test_a_checkpoint_that_lacks_a_part_is_refused(
    tmp_path: Path, backbone: Path, part: str, quantization: str
) -> None:
    folder = changed(backbone, tmp_path, weights=lambda name: None if part in name else name)
    with pytest.raises(UserError, match=rf"lacks \d+ weights? of the model.*{part}") as refused:
        load(folder, quantization)
    assert folder in refused.value.where and "config.json" in refused.value.fix


def test_weights_under_unknown_names_are_refused_with_the_names(tmp_path: Path, backbone: Path) -> None:
    folder = changed(backbone, tmp_path, weights=lambda name: f"module.{name}" if "vision_tower" in name else name)
    with pytest.raises(UserError, match=r"vision_tower.* and \d+ more\. The checkpoint has others.*: module\."):
        load(folder, "nf4")


def test_more_layers_than_the_checkpoint_has_are_refused(tmp_path: Path, backbone: Path) -> None:
    folder = changed(backbone, tmp_path, config=lambda facts: facts["text_config"].update(num_hidden_layers=3))
    with pytest.raises(UserError, match=r"lacks 9 weights of the model.*layers\.2\."):
        load(folder, "none")


def test_fewer_layers_than_the_checkpoint_has_are_told(tmp_path: Path, backbone: Path) -> None:
    folder = changed(backbone, tmp_path, config=lambda facts: facts["text_config"].update(num_hidden_layers=1))
    with pytest.warns(UserWarning, match=r"has 9 weights that the model does not know.*layers\.1\."):
        load(folder, "nf4")


@pytest.mark.parametrize("quantization", PRECISIONS)
@pytest.mark.parametrize(("size", "of"), [("vocab_size", "lm_head"), ("intermediate_size", "mlp")])
def test_weights_of_other_shapes_are_refused(
    tmp_path: Path, backbone: Path, size: str, of: str, quantization: str
) -> None:
    """Also in NF4, where transformers takes a layer's weight in whatever shape it comes."""
    folder = changed(backbone, tmp_path, config=lambda facts: facts["text_config"].update({size: 640}))
    with pytest.raises(UserError, match=rf"weights of other shapes.*{of}.* is .*by config\.json"):
        load(folder, quantization)


def test_a_tied_head_is_not_missing(tmp_path: Path, processor: Any) -> None:
    folder = save_llava(tmp_path, processor, layers=1, width=64, tied=True)
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load(str(folder), "nf4")
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_weights_that_nothing_knows_and_that_lie_elsewhere_are_left_out(tmp_path: Path, backbone: Path) -> None:
    """Such as the heads that predict several tokens, which transformers has no class for."""
    folder = changed(backbone, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(folder, "nf4")


def test_weights_that_no_image_needs_may_be_missing() -> None:
    anatomy = Anatomy("decoder", ("tower",), ("projector",), (), (), others=("audio",))
    report = {"missing_keys": {"audio.a"}, "unexpected_keys": (), "mismatched_keys": ()}
    with pytest.warns(UserWarning, match=r"lacks 1 weight that no image needs: audio\.a"):
        check_complete(nn.Identity(), anatomy, report, "x")
    with pytest.raises(UserError, match=r"lacks 1 weight of the model.*: audio_projector\.a"):
        check_complete(nn.Identity(), anatomy, {**report, "missing_keys": {"audio_projector.a"}}, "x")
