"""A static adapter added to the weights of its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import qmixlora.export.merge as merge_module
import qmixlora.export.merged as merged
from qmixlora.errors import UserError
from qmixlora.export.low_rank import LowRank
from qmixlora.export.merge import Base, Merge, nf4_round_trip
from qmixlora.export.static import StaticAdapter, read
from qmixlora.recipe import Edit
from qmixlora.session import Session, open_tuned_run

from .helpers import Q_PROJ, edit_recipe, exported, name_on_the_hub, recipe_of


@pytest.fixture
def older(backbone: Path, tmp_path: Path) -> Path:
    """The base in several shards, under the names of older checkpoints."""
    folder = Path(shutil.copytree(backbone, tmp_path / "older"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, start in enumerate(range(0, len(tensors), 20)):
        part = {name_on_the_hub(name): tensors[name] for name in list(tensors)[start : start + 20]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert any(name.startswith("language_model.model.layers.") for name in weight_map)
    return folder


def test_a_base_keeps_its_shards_and_its_older_names(run: Path, older: Path, tmp_path: Path) -> None:
    exported(run, projector="adapter")
    exported(run, forms=("merged",))
    spec = Edit({"model.id": str(older)}).apply(recipe_of(run)).model
    Merge(read(run / "exports" / "color-lora"), spec, "nf4").write(tmp_path / "merged")
    written: dict[str, Tensor] = {}
    for path in older.glob("*.safetensors"):
        written |= load_file(tmp_path / "merged" / path.name)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert written.keys() == index["weight_map"].keys()
    for name, tensor in load_file(run / "exports" / "color-merged" / "model.safetensors").items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("has_shards", [True, False])
def test_an_old_index_beside_the_one_file_is_not_followed(
    run: Path, backbone: Path, older: Path, tmp_path: Path, has_shards: bool
) -> None:
    """transformers loads the one file, and leaves the index of an earlier, sharded save in place."""
    for shard in older.glob("*.safetensors"):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}
        save_file(zeros, shard, {"format": "pt"}) if has_shards else shard.unlink()
    shutil.copyfile(backbone / "model.safetensors", older / "model.safetensors")
    spec = Edit({"model.id": str(older)}).apply(recipe_of(run)).model
    Merge(StaticAdapter({}), spec, "original").write(tmp_path / "merged")
    written, loaded = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (tmp_path / "merged", older)
    )
    assert all(torch.equal(written[name], tensor) for name, tensor in loaded.items())
    weights = {path.name for path in (tmp_path / "merged").iterdir() if "safetensors" in path.name}
    assert weights == {"model.safetensors"}


def test_weights_that_the_config_names_are_those_that_are_merged(
    run: Path, backbone: Path, older: Path, tmp_path: Path
) -> None:
    config = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors.index.json"}))
    (older / "model.safetensors.index.json").rename(older / "own.safetensors.index.json")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(backbone / "model.safetensors").items()}
    save_file(zeros, older / "model.safetensors", {"format": "pt"})
    spec = Edit({"model.id": str(older)}).apply(recipe_of(run)).model
    Merge(StaticAdapter({}), spec, "original").write(tmp_path / "merged")
    written, loaded = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (tmp_path / "merged", older)
    )
    assert all(torch.equal(written[name], tensor) for name, tensor in loaded.items())


@pytest.fixture
def adapter(run: Path) -> StaticAdapter:
    exported(run)
    return read(run / "exports" / "color-lora")


def merge(adapter: StaticAdapter, run: Path, base: Base) -> None:
    Merge(adapter, recipe_of(run).model, base).write(run / "merged")


def with_q_proj(adapter: StaticAdapter, update: LowRank) -> StaticAdapter:
    return replace(adapter, updates={**adapter.updates, Q_PROJ: update})


def test_a_module_that_the_base_does_not_have_is_refused(run: Path, adapter: StaticAdapter) -> None:
    elsewhere = {name.replace("layers.0", "layers.7"): update for name, update in adapter.updates.items()}
    with pytest.raises(UserError, match="no place of their own"):
        merge(replace(adapter, updates=elsewhere), run, "nf4")


def test_an_update_of_another_shape_is_refused(run: Path, adapter: StaticAdapter) -> None:
    update = adapter.updates[Q_PROJ]
    with pytest.raises(UserError, match="and \\(63, 64\\) in the adapter"):
        merge(with_q_proj(adapter, replace(update, up_OK=update.up_OK[:-1])), run, "original")


def test_a_sum_that_is_not_finite_is_refused(run: Path, adapter: StaticAdapter) -> None:
    update = adapter.updates[Q_PROJ]
    with pytest.raises(UserError, match="not finite"):
        merge(with_q_proj(adapter, replace(update, up_OK=update.up_OK * float("inf"))), run, "original")


def test_the_round_trip_is_what_training_saw(run: Path, backbone: Path) -> None:
    layer = open_tuned_run(run).backbone.get_submodule(Q_PROJ).get_base_layer()
    seen = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    tensors = load_file(backbone / "model.safetensors")
    (weight,) = (
        t for name, t in tensors.items() if "language" in name and name.endswith("layers.0.self_attn.q_proj.weight")
    )
    rounded = weight.clone()
    nf4_round_trip(rounded, torch.float32, torch.device("cpu"))
    assert torch.equal(rounded, seen.view_as(weight)) and not torch.equal(rounded, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(merge_module, "BLOCK", 2**12)
    torch.manual_seed(0)
    weight = torch.randn(96, 200, dtype=dtype)  # the last block is a short one, in scales too
    packed = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to("cpu")
    whole = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    nf4_round_trip(weight, dtype, torch.device("cpu"))
    assert torch.equal(weight, whole)


def test_a_card_that_is_full_of_a_merged_checkpoint_answers_one_row_at_a_time(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, sizes = merged.measure, list[int]()

    def full(session: Session, rows: Any) -> Any:
        sizes.append(session.recipe.train.eval_batch_size)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(session, rows)

    monkeypatch.setattr(merged, "measure", full)
    fidelity = exported(run, forms=("merged",), base="nf4")
    assert len(sizes) == 2 and sizes[0] > 1 == sizes[1]
    assert fidelity.measurements["merged"].score >= 0


def test_a_run_without_nf4_is_merged_into_the_weights_that_it_was_trained_on(run: Path) -> None:
    """What it never had in NF4 is not rounded to it, and the merged checkpoint computes what its adapter computes."""
    edit_recipe(run, model__quantization="none")
    fidelity = exported(run, forms=("merged",))
    assert fidelity.merging is not None and fidelity.merging.base == "original"
