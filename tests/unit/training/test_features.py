"""Cached features: the same run without the vision tower."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from qmixlora.errors import UserError
from qmixlora.evaluation import generate_answers
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import Session, TunedSession, open_run, open_session
from qmixlora.training import features, run, train, train_within_memory
from qmixlora.training.features import FeatureStore, compute, with_cached_features
from tests.adapters import randomize
from tests.unit.backbone.image_tokens.families import MAKERS, TOGETHER, draw, marked

from .helpers import QUIET, descend_plainly, images_of_their_own

CACHED = {"adapter": {"projector": "frozen"}, "train": {"cache_features": True}}
TASKS: list[str] = []


def count_calls(session: Session) -> list[int]:
    """The number of images in every pass of the vision tower from now on."""
    seen: list[int] = []
    tower = session.backbone.model.vision_tower
    tower.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    return seen


def test_loss_and_gradients_of_a_batch_are_what_they_are_without(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    """To the bit, where the tower sees the same images together."""
    rows = images_of_their_own(data, 6)
    made = []
    cached = {**CACHED, "train": {"cache_features": True, "eval_batch_size": 6}}
    for recipe in (make_recipe(adapter={"projector": "frozen"}), make_recipe(**cached)):
        session = open_session(recipe, TASKS)
        randomize(session.model, "mixlora_B", std=0.05, seed=1)
        if recipe.train.cache_features:
            session = with_cached_features(session, [rows], tmp_path, QUIET)
        batch = session.collator([rows[index] for index in range(6)])
        assert ("pixel_values" in batch) is not recipe.train.cache_features
        session.model.train()
        loss = supervised_loss(session.model, batch)
        loss.backward()
        made.append((loss, {n: p.grad for n, p in session.model.named_parameters() if p.requires_grad}))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1].keys() == made[1][1].keys()
    for name, grad in made[0][1].items():
        assert grad.abs().sum() > 0
        assert torch.equal(grad, made[1][1][name]), name


@dataclass
class Setting:
    """Training samples of which the first two have equal images in two files, and validation samples."""

    sections: dict[str, Any]
    images: int  # that differ, over both splits
    passes: list[list[int]]  # of the vision tower, in every session that training opens

    def recipe(self, make_recipe: Callable[..., Recipe], output: Path, **spec: Any) -> Recipe:
        evaluated = {"max_steps": 4, "save_every": 2, "eval_every": 2, "eval_batch_size": 16, "output": str(output)}
        return make_recipe(**self.sections, train={**evaluated, **spec})


@pytest.fixture
def setting(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    passes: list[list[int]] = []

    def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
        session = open_session(recipe, tasks)
        passes.append(count_calls(session))
        return session

    monkeypatch.setattr(run, "open_session", opened)
    images = [row["images"][0]["path"] for row in images_of_their_own(data, 7)]
    samples = json.loads((data / "train.json").read_text())[:8]
    for index, sample in enumerate(samples):
        sample["image"] = f"{index}.png"
        shutil.copy(images[max(index - 1, 0)], tmp_path / f"{index}.png")
    (tmp_path / "train.json").write_text(json.dumps(samples))
    validation = {sample["image"] for sample in json.loads((data / "validation.json").read_text())}
    sections = {
        "data": {"train": str(tmp_path / "train.json"), "validation": str(data / "validation.json")},
        "adapter": {"projector": "frozen", "dropout": 0.1},
    }
    return Setting(sections, 7 + len(validation), passes)


def test_the_tower_sees_every_image_once_in_a_run_and_never_in_a_resumed_one(
    setting: Setting, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Two epochs with evaluations; equal images count once."""
    folder = train(setting.recipe(make_recipe, tmp_path / "run", cache_features=True), console=QUIET)
    assert sum(setting.passes[0]) == setting.images == len(list((folder / "features").iterdir()))
    longer = setting.recipe(make_recipe, tmp_path / "run", cache_features=True, max_steps=6)
    train(longer, resume=True, console=QUIET)
    assert setting.passes[1] == []


def test_a_run_with_cached_features_learns_what_one_without_does(
    setting: Setting, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding: the tower sees other images together."""
    descend_plainly(monkeypatch)
    weights = []
    for cached in (False, True):
        recipe = setting.recipe(make_recipe, tmp_path / str(cached), cache_features=cached, learning_rate=1.0)
        folder = train(recipe, console=QUIET)
        weights.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert sum(setting.passes[0]) > 2 * 8 and sum(setting.passes[1]) == setting.images
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_with_cached_features_answers_with_its_vision_tower(
    make_recipe: Callable[..., Recipe], data: Path
) -> None:
    folder = train(make_recipe(**{**CACHED, "train": {"cache_features": True, "max_steps": 1}}), console=QUIET)
    session = open_run(folder)
    seen = count_calls(session)
    assert len(generate_answers(session, [images_of_their_own(data, 2)[0]], 2)) == 1 and seen == [1]


def test_equal_images_have_one_file_wherever_they_lie(data: Path, tmp_path: Path) -> None:
    image = images_of_their_own(data, 1)[0]["images"][0]
    as_bytes = {"path": None, "bytes": Path(image["path"]).read_bytes()}
    store = FeatureStore(tmp_path, "a")
    assert store.path(image) == store.path(as_bytes)
    assert store.path(image) != FeatureStore(tmp_path, "b").path(image)


@pytest.mark.parametrize("other", ["dtype", "weights"])
def test_features_of_another_backbone_have_files_of_their_own(
    other: str, make_recipe: Callable[..., Recipe], data: Path, backbone: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(backbone, tmp_path / "other")  # of the same configuration; the weights may differ
    spec = {"dtype": "bfloat16"} if other == "dtype" else {"id": str(copy)}
    for changed in ({}, spec):
        session = open_session(make_recipe(**CACHED, model=changed), TASKS)
        with_cached_features(session, [images_of_their_own(data, 2)], tmp_path / "run", QUIET)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 4


def test_features_of_images_that_looked_otherwise_are_computed_anew(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (features.APPEARANCE_VERSION, features.APPEARANCE_VERSION - 1):
        monkeypatch.setattr(features, "APPEARANCE_VERSION", version)
        with_cached_features(
            open_session(make_recipe(**CACHED), TASKS), [images_of_their_own(data, 2)], tmp_path, QUIET
        )
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_the_entries_of_an_image_are_kept_where_there_are_several(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(**CACHED), TASKS)
    base: Any = session.backbone.base_model
    own = base.get_image_features

    def in_tiles(pixel_values: torch.Tensor) -> Any:
        return own(pixel_values=torch.cat([pixel_values, pixel_values]))

    base.get_image_features = in_tiles
    with_cached_features(session, [images_of_their_own(data, 2)], tmp_path, QUIET)
    kept = [load_file(path)["pooler_output"].shape for path in (tmp_path / "features").iterdir()]
    assert len(kept) == 2 and {shape[0] for shape in kept} == {2 * 4}  # of four tokens each, one after the other


def test_a_disk_that_is_too_small_is_noticed_after_the_first_images(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(make_recipe(**{**CACHED, "train": {"cache_features": True, "eval_batch_size": 2}}), TASKS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="The features of 6 images take"):
        with_cached_features(session, [images_of_their_own(data, 6)], tmp_path, QUIET)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_model_on_meta_has_no_vision_tower_left(backbone: Path) -> None:
    from transformers import AutoConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(backbone))
    use_features(model, find_anatomy(model))
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "projector" in name]
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.is_meta


@dataclass(frozen=True)
class Written:
    """A collator for processors without a chat template: an image, then words."""

    processor: Any

    def prompts(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images = [[Image.open(io.BytesIO(row["images"][0]["bytes"]))] for row in rows]
        texts = [f"word {marked(self.processor)} word word"] * len(rows)
        return dict(self.processor(text=texts, images=images, return_tensors="pt", padding=True))


def drawn(*shape: int) -> dict[str, Any]:
    file = io.BytesIO()
    draw(*shape).save(file, "PNG")
    return {"path": None, "bytes": file.getvalue()}


IMAGES = [drawn(112, 64), drawn(64, 96)]


def session_of(family: str, recipe: Recipe) -> TunedSession:
    """A random model of a family with a plain LoRA, and its real processor."""
    config, processor = MAKERS[family]()
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
    model = get_peft_model(backbone, LoraConfig(target_modules=["q_proj"])).eval()
    return TunedSession(recipe, model, find_anatomy(backbone), Written(processor))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(MAKERS.keys() - TOGETHER))
def test_features_of_images_one_by_one_give_the_logits_of_all_together(
    family: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Images of two sizes."""
    session = session_of(family, make_recipe(**{**CACHED, "train": {"cache_features": True, "eval_batch_size": 1}}))
    inputs = session.collator.prompts([{"images": [image]} for image in IMAGES])
    with torch.no_grad():
        expected = session.model(**inputs).logits
    store = FeatureStore(tmp_path, "x")
    for image in IMAGES:
        compute(session, store, [image])
    use_features(session.backbone, session.anatomy)
    inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    with torch.no_grad():
        logits = session.model(**inputs, image_features=store.read(IMAGES)).logits
    torch.testing.assert_close(logits, expected)


def test_a_model_that_calls_its_vision_tower_itself_is_told_apart(
    make_recipe: Callable[..., Recipe],
) -> None:
    session = session_of("llava", make_recipe(**CACHED))
    inputs = session.collator.prompts([{"images": [image]} for image in IMAGES])
    use_features(session.backbone, session.anatomy)
    with pytest.raises(UserError, match="calls its vision tower itself"):
        session.backbone.base_model.vision_tower(inputs["pixel_values"])


def test_out_of_memory_in_the_tower_takes_fewer_images_at_a_time(
    make_recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
        session = open_session(recipe, tasks)

        def too_small(tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if len(next(iter([*args, *kwargs.values()]))) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        session.backbone.model.vision_tower.register_forward_pre_hook(too_small, with_kwargs=True)
        return session

    monkeypatch.setattr(run, "open_session", opened)
    screen = io.StringIO()
    folder = train_within_memory(make_recipe(**CACHED), console=Console(file=screen, width=200))
    assert "while computing the features of images" in screen.getvalue()
    assert load_recipe(str(folder / "recipe.yaml")).train.eval_batch_size == 4
