"""The embedded backbone: an ordinary checkpoint, the same whenever it is made on a machine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qmixlora.demo import backbone
from qmixlora.demo.scenes import draw_scene, sample_scene
from qmixlora.demo.tasks import HELD_OUT, TASKS, caption


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELL_STEPS", "SCENE_STEPS"):
        monkeypatch.setattr(backbone, name, 2)
    monkeypatch.setattr(backbone, "CELL_BATCH", 8)


@pytest.mark.long
@pytest.mark.usefixtures("few_steps")
def test_the_backbone_is_made_the_same_again(tmp_path: Path) -> None:
    folders = [backbone.make_backbone(tmp_path / name) for name in "ab"]
    weights, again = (load_file(folder / "model.safetensors") for folder in folders)
    assert all((weights[key] == again[key]).all() for key in weights)


@pytest.mark.usefixtures("few_steps")
def test_making_the_backbone_tells_its_steps_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    backbone.make_backbone(tmp_path / "a", lambda *step: told.append(step))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("few_steps")
def test_a_backbone_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = backbone.make_backbone(tmp_path / "a")
    told: list[tuple[int, int]] = []
    assert backbone.make_backbone(folder, lambda *step: told.append(step)) == folder and told == []


@pytest.mark.usefixtures("few_steps")
def test_the_backbone_is_an_ordinary_checkpoint_that_knows_every_word(tmp_path: Path) -> None:
    folder = backbone.make_backbone(tmp_path / "a")
    assert 1e6 <= AutoModelForImageTextToText.from_pretrained(folder).num_parameters() <= 2e6
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.unk_token_id not in tokenizer(everything_that_is_said())["input_ids"]


def everything_that_is_said() -> str:
    rng = random.Random(5)
    scenes = [sample_scene(rng, range(1797)) for _ in range(50)]
    texts = [text for scene in scenes for task in (*TASKS, *HELD_OUT) for text in task.ask(scene, rng)]
    return " ".join([*texts, *(caption(scene, rng) for scene in scenes)])


def test_ready_made_batches_are_those_of_the_processor(processor: Any) -> None:
    image = draw_scene(sample_scene(random.Random(2), range(10)))
    own = backbone._caption_batch(processor, [(image, "circle red .")])
    theirs = processor(images=[image], text=["<image> circle red . <eos>"], return_tensors="pt")
    assert (own["input_ids"] == theirs["input_ids"]).all()
    assert (own["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5
    assert (own["labels"] != -100).sum() == 4
