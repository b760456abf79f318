"""Cached features: the same run without the vision tower."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy
from qmixlora.backbone.levers import use_features
from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.evaluation import generate_answers
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import Session, open_run, open_session
from qmixlora.training import run as training
from qmixlora.training import train, train_within_memory
from qmixlora.training.features import FeatureStore, compute, with_cached_features
from tests.unit.backbone.image_tokens.families import MAKERS, draw

QUIET = Console(file=io.StringIO())
CACHED = {"adapter": {"train_projector": False}, "train": {"cache_features": True}}
TASKS: list[str] = []


def rows_of(data: Path, count: int) -> Any:
    """Samples with a picture each of its own."""
    rows = load_conversations(str(data / "train.json"))
    first = {row["images"][0]["path"]: index for index, row in reversed(list(enumerate(rows)))}
    return rows.select(sorted(first.values())[:count])


def count_calls(session: Session) -> list[int]:
    """The number of pictures in every pass of the vision tower from now on."""
    seen: list[int] = []
    tower = session.model.get_base_model().model.vision_tower
    tower.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    return seen


def test_loss_and_gradients_are_what_they_are_without(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    rows = rows_of(data, 6)
    found = []
    for recipe in (make_recipe(adapter={"train_projector": False}), make_recipe(**CACHED)):
        session = open_session(recipe, TASKS)
        torch.manual_seed(1)
        for name, parameter in session.model.named_parameters():
            if "mixlora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        if recipe.train.cache_features:
            session = with_cached_features(session, [rows], tmp_path, QUIET)
        batch = session.collator([rows[index] for index in range(6)])
        assert ("pixel_values" in batch) is not recipe.train.cache_features
        session.model.train()
        loss = supervised_loss(session.model, batch)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in session.model.named_parameters() if p.requires_grad}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert grad.abs().sum() > 0
        assert torch.equal(grad, found[1][1][name]), name


def test_the_tower_runs_once_for_equal_pictures_and_never_again(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs with evaluations, a resumed run, and the same run with pixels; then generation, as ever."""
    passes: list[list[int]] = []

    def opened(recipe: Recipe, tasks: list[str]) -> Session:
        session = open_session(recipe, tasks)
        passes.append(count_calls(session))
        return session

    monkeypatch.setattr(training, "open_session", opened)
    pictures = [row["images"][0]["path"] for row in rows_of(data, 7)]
    samples = json.loads((data / "train.json").read_text())[:8]
    for index, sample in enumerate(samples):
        sample["image"] = f"{index}.png"
        shutil.copy(pictures[max(index - 1, 0)], tmp_path / f"{index}.png")  # the first two are equal
    (tmp_path / "train.json").write_text(json.dumps(samples))
    seen = {sample["image"] for sample in json.loads((data / "validation.json").read_text())}
    sections: dict[str, Any] = {
        "data": {"train": str(tmp_path / "train.json"), "validation": str(data / "validation.json")},
        "adapter": {"train_projector": False, "dropout": 0.1},
    }
    spec = {"max_steps": 4, "save_every": 2, "eval_every": 2, "eval_batch_size": 16}
    pixels = train(make_recipe(**sections, train={**spec, "output": str(tmp_path / "pixels")}), console=QUIET)
    spec |= {"cache_features": True, "output": str(tmp_path / "cached")}
    cached = train(make_recipe(**sections, train=spec), console=QUIET)
    assert sum(passes[1]) == 7 + len(seen) == len(list((cached / "features").iterdir()))
    assert sum(passes[0]) > 2 * 8
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (pixels, cached)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)

    train(make_recipe(**sections, train={**spec, "max_steps": 6}), resume=True, console=QUIET)
    assert passes[2] == []
    session = open_run(cached)
    assert len(generate_answers(session.model, session.collator, [rows_of(data, 2)[0]], 2)) == 1


def test_features_are_named_by_all_that_decides_them(
    make_recipe: Callable[..., Recipe], data: Path, backbone: Path, tmp_path: Path
) -> None:
    image = rows_of(data, 1)[0]["images"][0]
    names = {FeatureStore(tmp_path, "a").path(image), FeatureStore(tmp_path, "b").path(image)}
    assert len(names) == 2
    as_bytes = {"path": None, "bytes": Path(image["path"]).read_bytes()}
    assert FeatureStore(tmp_path, "a").path(as_bytes) in names
    other = shutil.copytree(backbone, tmp_path / "other")  # of the same configuration; the weights may differ
    for spec in ({}, {"dtype": "bfloat16"}, {"id": str(other)}):
        with_cached_features(
            open_session(make_recipe(**CACHED, model=spec), TASKS), [rows_of(data, 2)], tmp_path / "run", QUIET
        )
    assert len(list((tmp_path / "run" / "features").iterdir())) == 6


def test_a_model_with_other_than_one_entry_per_picture_is_refused(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(**CACHED), TASKS)
    base = session.model.get_base_model()
    own = base.get_image_features

    def in_tiles(pixel_values: torch.Tensor) -> Any:
        return own(pixel_values=torch.cat([pixel_values, pixel_values]))

    base.get_image_features = in_tiles
    with pytest.raises(UserError, match="one entry of features per picture"):
        with_cached_features(session, [rows_of(data, 2)], tmp_path, QUIET)


def test_a_disk_that_is_too_small_is_found_after_the_first_pictures(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(make_recipe(**{**CACHED, "train": {"cache_features": True, "eval_batch_size": 2}}), TASKS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="The features of 6 pictures take"):
        with_cached_features(session, [rows_of(data, 6)], tmp_path, QUIET)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_model_on_meta_has_no_vision_tower_left(backbone: Path) -> None:
    from transformers import AutoConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(backbone))
    use_features(model, find_anatomy(model))
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "projector" in name]
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.is_meta


class Written:
    """A collator for processors without a chat template: the picture, then words."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def prompts(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        mark = "<start> <image> <end>" if "Qwen" in type(self.processor).__name__ else "<image>"
        pictures = [[Image.open(io.BytesIO(row["images"][0]["bytes"]))] for row in rows]
        texts = [f"word {mark} word word"] * len(rows)
        return dict(self.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


@pytest.mark.parametrize("family", MAKERS)
def test_families(family: str, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Pictures of two sizes, their features computed one by one, are what they are together; or they are refused."""
    config, processor = MAKERS[family]()
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
    model = get_peft_model(backbone, LoraConfig(target_modules=["q_proj"])).eval()
    recipe = make_recipe(**{**CACHED, "train": {"cache_features": True, "eval_batch_size": 1}})
    collator: Any = Written(processor)
    session = Session(recipe, model, processor, find_anatomy(backbone), collator)
    images = []
    for shape in ((112, 64), (64, 96)):
        file = io.BytesIO()
        draw(*shape).save(file, "PNG")
        images.append({"path": None, "bytes": file.getvalue()})
    rows = [{"images": [image]} for image in images]
    inputs = collator.prompts(rows)
    with torch.no_grad():
        expected = model(**inputs).logits
    store = FeatureStore(tmp_path, "x")
    if family == "internvl":  # an entry for every tile
        with pytest.raises(UserError, match="one entry of features per picture"):
            compute(session, store, images[:1])
        return
    for image in images:
        compute(session, store, [image])
    use_features(backbone, session.anatomy)
    inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    with torch.no_grad():
        found = model(**inputs, mm_encoder_outputs={"image": store.read(images)}).logits
    torch.testing.assert_close(found, expected)


def test_out_of_memory_in_the_tower_takes_fewer_pictures_at_a_time(
    make_recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(recipe: Recipe, tasks: list[str]) -> Session:
        session = open_session(recipe, tasks)

        def too_small(tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if len(next(iter([*args, *kwargs.values()]))) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        session.model.get_base_model().model.vision_tower.register_forward_pre_hook(too_small, with_kwargs=True)
        return session

    monkeypatch.setattr(training, "open_session", opened)
    screen = io.StringIO()
    folder = train_within_memory(make_recipe(**CACHED), console=Console(file=screen, width=200))
    assert "while computing the features of pictures" in screen.getvalue()
    assert load_recipe(str(folder / "recipe.yaml")).train.eval_batch_size == 4
