"""An export has the settings of its run where stock libraries and servers look for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from qmixlora.data import load_conversations, open_images, to_messages
from qmixlora.export.gguf_loras import carry_stops_and_limits
from qmixlora.export.job import Job
from qmixlora.export.settings import GENERATION, TEMPLATE, carry_settings
from qmixlora.export.targets import Request
from qmixlora.manifest import first_change
from qmixlora.recipe import Recipe
from qmixlora.serving.files.exports import image_limits
from qmixlora.session import open_collator, open_run
from tests.families.checkpoint import make_checkpoint, make_data
from tests.families.variants import llava_onevision, qwen2_5_vl

from .helpers import QUIET, edit_recipe, exported, recipe_of


def with_another_end(run: Path, backbone: Path, tmp_path: Path) -> None:
    """The run on a base whose chat template ends answers in a token that its generation does not stop at."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in backbone.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / TEMPLATE
    template.write_text(template.read_text(encoding="utf-8").replace("<eos>", "<unk>"), encoding="utf-8")
    edit_recipe(run, model__id=str(folder))


def test_a_merged_checkpoint_stops_where_the_run_did(run: Path, backbone: Path, tmp_path: Path) -> None:
    with_another_end(run, backbone, tmp_path)
    folder = exported(run, forms=("merged",)).folder
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [2, 4]
    assert open_run(folder).collator.stop_ids == [2, 4]


def test_a_lora_on_the_model_itself_says_where_to_stop(run: Path, backbone: Path, tmp_path: Path) -> None:
    with_another_end(run, backbone, tmp_path)
    fidelity = exported(run, projector="adapter")
    assert json.loads((fidelity.folder / GENERATION).read_text(encoding="utf-8")) == {"eos_token_id": [2, 4]}
    assert any(GENERATION in note for note in fidelity.notes)


def test_a_base_stops_for_its_loras(run: Path, backbone: Path, tmp_path: Path) -> None:
    with_another_end(run, backbone, tmp_path)
    fidelity = exported(run)
    base = json.loads((run / "exports" / "base" / GENERATION).read_text(encoding="utf-8"))
    assert base["eos_token_id"] == [2, 4]
    assert not (fidelity.folder / GENERATION).exists() and fidelity.notes == ()


def test_a_file_of_llama_cpp_says_where_to_stop(run: Path, backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    with_another_end(run, backbone, tmp_path)
    fidelity = exported(run, forms=("gguf",))
    written = json.loads((fidelity.folder / GENERATION).read_text(encoding="utf-8"))
    assert written == {"eos_token_id": [4], "stop_strings": ["<unk>"]}
    (note,) = (note for note in fidelity.notes if "'<unk>'" in note)
    assert "--override-kv tokenizer.ggml.eot_token_id=int:4" in note
    assert note in (fidelity.folder / "README.md").read_text() and first_change(fidelity.folder) is None


@pytest.fixture
def checkpoint_with(tmp_path: Path) -> Callable[..., tuple[Path, Recipe]]:
    """The checkpoint of a family with images of many tokens, and a recipe for it with values of one's own."""

    def make(variant: Any, **values: Any) -> tuple[Path, Recipe]:
        folder = tmp_path / "model"
        folder.mkdir()
        make_checkpoint(variant, folder)
        (tmp_path / "data").mkdir()
        sections: dict[str, Any] = {
            "model": {"id": str(folder), "dtype": "float32", **values.get("model", {})},
            "data": {"train": str(make_data(tmp_path / "data")), "max_length": 1500, **values.get("data", {})},
            "train": {"output": str(tmp_path / "run"), "max_new_tokens": 7},
        }
        return folder, Recipe.model_validate(sections)

    return make


def tokens_of(processor: Any, row: Any) -> dict[str, torch.Tensor]:
    """What anybody gets from a processor for a row's question."""
    images = iter(open_images(row["images"]))
    messages = to_messages(row["turns"][:-1])
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = next(images)
    return dict(
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


@pytest.mark.parametrize("budget", [4, None])
def test_a_file_of_llama_cpp_says_how_large_images_may_be(
    checkpoint_with: Callable[..., tuple[Path, Recipe]], tmp_path: Path, budget: int | None
) -> None:
    """The processor's limits as the run held them, whose model has others."""
    model, recipe = checkpoint_with(qwen2_5_vl.VARIANT, data={"max_image_tokens": budget})
    job, folder = Job(tmp_path, recipe, Request(), QUIET, open_collator(recipe)), tmp_path / "a-gguf"
    folder.mkdir()
    notes, limits = carry_stops_and_limits(job, folder), image_limits(folder)
    before = image_limits(model)
    assert before is not None and limits == (before if budget is None else (1, 4))
    told = [note for note in notes if "data.max_image_tokens=4" in note]
    assert [f"--image-max-tokens {budget}" in note for note in told] == [True] * (budget is not None)


@pytest.mark.parametrize("variant", [qwen2_5_vl.VARIANT, llava_onevision.VARIANT], ids=["qwen2.5-vl", "onevision"])
@pytest.mark.parametrize("layout", ["now", "older"])
def test_stock_processors_make_the_runs_tokens_of_large_images(
    checkpoint_with: Callable[..., tuple[Path, Recipe]], tmp_path: Path, variant: Any, layout: str
) -> None:
    """Where it lies in the files of today, and of earlier releases (`preprocessor_config.json`)."""
    budget = 36 if variant is llava_onevision.VARIANT else 4
    model, recipe = checkpoint_with(variant, data={"max_image_tokens": budget})
    if layout == "older":
        AutoProcessor.from_pretrained(model).image_processor.save_pretrained(model)
        content = json.loads((model / "processor_config.json").read_text())
        del content["image_processor"]
        (model / "processor_config.json").write_text(json.dumps(content))
    collator = open_collator(recipe)
    export = Path(shutil.copytree(model, tmp_path / "export"))
    carry_settings(export, recipe, collator)
    row = load_conversations(str(recipe.data.train))[2]  # the largest image
    stock = tokens_of(AutoProcessor.from_pretrained(export), row)
    expected = collator.prompts([row])
    assert torch.equal(stock["input_ids"], expected["input_ids"])
    torch.testing.assert_close(stock["pixel_values"], expected["pixel_values"])
    unlimited = tokens_of(AutoProcessor.from_pretrained(model), row)
    assert unlimited["input_ids"].shape[1] > stock["input_ids"].shape[1]
    if variant is llava_onevision.VARIANT:
        pinpoints = [AutoConfig.from_pretrained(folder).image_grid_pinpoints for folder in (model, export)]
        assert len(pinpoints[1]) < len(pinpoints[0])


def test_arguments_of_the_chat_template_are_its_defaults(run: Path, backbone: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(backbone, tmp_path / "base"))
    template = (folder / TEMPLATE).read_text(encoding="utf-8")
    (folder / TEMPLATE).write_text(
        template + "{% if mood is defined and mood %}{{ mood }} {% endif %}", encoding="utf-8"
    )
    edit_recipe(run, model__id=str(folder), model__template_arguments={"mood": "color"})
    exported(run)
    stock = AutoProcessor.from_pretrained(run / "exports" / "base")
    asked = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]
    assert "color" in stock.apply_chat_template(asked) and "shape" in stock.apply_chat_template(asked, mood="shape")
    assert "color" not in AutoProcessor.from_pretrained(folder).apply_chat_template(asked)


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_an_export_answers_greedily_as_long_as_the_run_did(
    run: Path, backbone: Path, tmp_path: Path, form: Any
) -> None:
    """`top_k: 1` is what vLLM and SGLang read; a penalty of the base's is none that the run was measured with."""
    folder = Path(shutil.copytree(backbone, tmp_path / "base"))
    own = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    sampling = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}
    (folder / GENERATION).write_text(json.dumps({**own, **sampling}), encoding="utf-8")
    edit_recipe(run, model__id=str(folder))
    exported(run, forms=(form,))
    written = json.loads((run / "exports" / ("base" if form == "lora" else "color-merged") / GENERATION).read_text())
    assert (written["do_sample"], written["top_k"], written["eos_token_id"]) == (True, 1, own["eos_token_id"])
    logits = torch.full((1, 50), -5.0)
    logits[0, [3, 40, 7]] = 2.0  # as likely as each other
    kept = TopPLogitsWarper(written["top_p"])(None, TopKLogitsWarper(written["top_k"])(None, logits))
    assert kept.isfinite().sum() == 1
    assert written["max_new_tokens"] == recipe_of(run).train.max_new_tokens == 4
    assert "repetition_penalty" not in written and "temperature" not in written
    GenerationConfig(**written).validate(strict=True)  # as transformers does before it saves a model that has changed
