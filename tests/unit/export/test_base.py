"""The base of a run's LoRAs: its model with the trained projector, once, under the names that servers know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from qmixlora.demo.backbone import make_config, save_backbone
from qmixlora.errors import UserError
from qmixlora.export import Request, export
from qmixlora.export.names import folder_names
from qmixlora.export.static import learned_by
from qmixlora.session import open_collator, open_run, open_tuned_run

from .helpers import (
    MODEL_INPUTS,
    QUIET,
    TASKS,
    edit_recipe,
    exported,
    logits,
    name_on_the_hub,
    on_the_hub,
    recipe_of,
    rows_of,
)

PROJECTOR = "multi_modal_projector."


@pytest.fixture
def exports(run: Path) -> Path:
    export(run, Request(tasks=TASKS, fingerprint=False), QUIET)
    return run / "exports"


def test_a_base_is_the_model_with_the_trained_projector_and_nothing_else(
    run: Path, exports: Path, backbone: Path
) -> None:
    before = on_the_hub(load_file(backbone / "model.safetensors"))
    base = load_file(exports / "base" / "model.safetensors")
    assert base.keys() == before.keys()
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, before[name])}
    learned = {name_on_the_hub(n): value for n, value in learned_by(open_tuned_run(run).model).modules.items()}
    assert changed == learned.keys() and len(changed) == 4
    assert all(torch.equal(base[name], value) for name, value in learned.items())


def test_a_lora_says_the_revision_and_the_code_of_the_model_that_it_lies_on(run: Path) -> None:
    edit_recipe(run, model__revision="v2", model__trust_remote_code=True)
    for projector, revision in (("adapter", "v2"), ("base", None)):
        folder = exported(run, projector=projector).folder
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == revision
        typed = "" if revision is None else ", revision='v2'"
        assert f"from_pretrained(BASE{typed}, trust_remote_code=True)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("form", ["base", "color-merged"])
def test_exports_have_the_names_of_the_hub(run: Path, form: str) -> None:
    """vLLM and llama.cpp know `vision_tower.vision_model...` alone; transformers saves a model from scratch without."""
    export(run, Request(tasks=("color",), forms=("lora", "merged"), fingerprint=False), QUIET)
    folder = run / "exports" / form
    tower = [name for name in load_file(folder / "model.safetensors") if "vision_tower" in name]
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_the_embedded_backbone_is_saved_under_the_names_of_the_hub(tmp_path: Path, processor: object) -> None:
    config = make_config(processor.tokenizer, layers=1, width=64)  # type: ignore[attr-defined]
    model = LlavaForConditionalGeneration(config)
    save_backbone(model, processor, tmp_path)  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in tensors
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_shards_without_the_projector_are_the_models_own(run: Path, backbone: Path, tmp_path: Path) -> None:
    """Hard links: a base takes the disk of the shards that the projector lies in."""
    folder = Path(shutil.copytree(backbone, tmp_path / "sharded"))
    tensors = on_the_hub(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        weight_map[name] = f"model-{'projector' if name.startswith(PROJECTOR) else 'rest'}.safetensors"
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit_recipe(run, model__id=str(folder))
    exported(run)
    base = run / "exports" / "base"
    assert (base / "model-rest.safetensors").samefile(folder / "model-rest.safetensors")
    assert not (base / "model-projector.safetensors").samefile(folder / "model-projector.safetensors")
    AutoModelForImageTextToText.from_pretrained(base)


def test_stock_peft_adds_mixes_and_swaps_the_adapters_of_a_run(run: Path, exports: Path) -> None:
    """Modules saved whole refuse all three."""
    rows = rows_of(run, "color").select([0, 1])
    inputs = open_collator(recipe_of(run))(list(rows))
    inputs = {name: inputs[name][:1].repeat(2, *[1] * (inputs[name].dim() - 1)) for name in MODEL_INPUTS}
    base = AutoModelForImageTextToText.from_pretrained(exports / "base")
    model = PeftModel.from_pretrained(base, str(exports / "color-lora"), adapter_name="color").eval()
    model.load_adapter(str(exports / "count-lora"), "count")
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=list(TASKS)).logits
        alone = []
        for task in TASKS:
            model.set_adapter(task)
            alone.append(model(**inputs).logits[0])
        model.add_weighted_adapter(list(TASKS), [0.5, 0.5], "both", combination_type="linear")
        hotswap_adapter(model, str(exports / "count-lora"), adapter_name="color")
        model.set_adapter("color")
        swapped = model(**inputs).logits[0]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(swapped, alone[1], atol=1e-4, rtol=0)


def test_an_adapter_finds_its_base_where_both_have_moved(run: Path, exports: Path, tmp_path: Path) -> None:
    config = json.loads((exports / "color-lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((exports / "base").resolve())
    rows = rows_of(run, "color")
    before = logits(open_run(exports / "color-lora"), rows)
    exports.rename(tmp_path / "moved")
    assert torch.equal(logits(open_run(tmp_path / "moved" / "color-lora"), rows), before)
    shutil.move(tmp_path / "moved" / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="base of this adapter, which has the trained projector, is not there"):
        open_run(tmp_path / "moved" / "color-lora")


def test_an_adapter_is_refused_on_the_base_of_another_run(exports: Path) -> None:
    record = json.loads((exports / "base" / "base.json").read_text())
    (exports / "base" / "base.json").write_text(json.dumps({**record, "projector": "another"}))
    with pytest.raises(UserError, match="lies on another base") as error:
        open_run(exports / "color-lora")
    assert "Export this task again" in str(error.value)


def test_a_base_is_made_once_and_again_for_another_projector(run: Path, exports: Path) -> None:
    console, inode = Console(record=True, quiet=True), (exports / "base").stat().st_ino
    export(run, Request(tasks=("color",), fingerprint=False), console)
    assert (exports / "base").stat().st_ino == inode
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({n: t + ("projector" in n) for n, t in adapter.items()}, run / "adapter" / "adapter_model.safetensors")
    (run / "manifest.json").unlink()
    assert "export them again" in said_by_an_export_of_color(run)
    assert (exports / "base").stat().st_ino != inode
    with pytest.raises(UserError, match="lies on another base"):
        open_run(exports / "count-lora")


def said_by_an_export_of_color(run: Path) -> str:
    with (run / "said").open("w") as file:
        export(run, Request(tasks=("color",), fingerprint=False), Console(file=file, width=300))
    return (run / "said").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "base.json"])
def test_a_damaged_base_is_made_again(run: Path, exports: Path, name: str) -> None:
    file = exports / "base" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert f"not as it was written: {name} has another content" in said_by_an_export_of_color(run)
    assert file.read_bytes() == whole


def test_a_base_that_is_made_again_for_an_edited_recipe_leaves_its_adapters_of_use(run: Path, exports: Path) -> None:
    edit_recipe(run, train__max_new_tokens=5)
    said = said_by_an_export_of_color(run)
    assert "recipe is another one" in said and "export them again" not in said
    generation = json.loads((exports / "base" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 5
    open_run(exports / "count-lora")


def test_a_run_without_a_trained_projector_needs_no_base(make_run: Callable[..., Path]) -> None:
    run = make_run(target_modules=["q_proj", "v_proj"], projector="frozen")
    fidelity = exported(run)
    config = json.loads((run / "exports" / "color-lora" / "adapter_config.json").read_text())
    assert [path.name for path in (run / "exports").iterdir()] == ["color-lora"]
    assert config["base_model_name_or_path"] == recipe_of(run).model.id and fidelity.projector is None
    assert fidelity.notes == ()


def test_a_whole_projector_in_the_adapter_lies_on_the_model_as_it_is(run: Path) -> None:
    exported(run, projector="adapter")
    folder = run / "exports" / "color-lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector"]
    assert not (run / "exports" / "base").exists() and not (folder / "base.json").exists()
    rows = rows_of(run, "color")
    whole = logits(open_run(folder), rows)
    exported(run)
    torch.testing.assert_close(logits(open_run(folder), rows), whole, atol=1e-5, rtol=0)


def test_no_task_takes_the_folder_of_the_base() -> None:
    assert "base" not in {f"{name}-lora" for name in folder_names(["base", "", "-"]).values()}
