"""The embedded data set and backbone: real, deterministic, and not to be answered blind."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qmixlora.data import load_conversations
from qmixlora.demo import backbone as demo_backbone
from qmixlora.demo import dataset, resolve
from qmixlora.demo.scenes import GRID, digit_scans, draw_scene, place, sample_scene
from qmixlora.demo.tasks import HELD_OUT, NUMBERS, TASKS, caption
from qmixlora.errors import UserError
from qmixlora.evaluation import blind_baseline
from qmixlora.recipe import Recipe


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SPLITS", {"train": 3, "validation": 1, "test": 1})
    digests = [digest(dataset.make_dataset(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]


def test_paraphrases_ask_the_same_in_words_never_trained_on(data: Path) -> None:
    train, test, paraphrased = (
        json.loads((data / f"{split}.json").read_text()) for split in ("train", "test", "paraphrased")
    )
    vocabulary = {word for row in train for word in row["conversations"][0]["value"].split()}
    rng = random.Random(0)
    scenes = [sample_scene(rng, range(100)) for _ in range(300)]
    for task in TASKS:
        trained = {task.ask(scene, rng)[0] for scene in scenes}
        assert not trained & {task.paraphrase(question) for question in trained}, task.name
    for before, after in zip(test, paraphrased, strict=True):
        asked, again = before["conversations"][0].pop("value"), after["conversations"][0].pop("value")
        assert before == after  # picture, task, answer
        assert asked != again and set(again.split()) <= vocabulary | set(asked.split())


def test_a_data_set_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").touch()
    with pytest.raises(UserError, match=r"validation.json.*is missing"):
        dataset.make_dataset(tmp_path)


def test_ten_tasks_share_pictures_and_six_are_held_out(data: Path) -> None:
    rows = json.loads((data / "train.json").read_text())
    assert {row["task"] for row in rows} == {task.name for task in TASKS} and len(TASKS) >= 8
    assert {row["task"] for row in json.loads((data / "held_out.json").read_text())} == {t.name for t in HELD_OUT}
    assert not {t.name for t in HELD_OUT} & {t.name for t in TASKS}
    tasks_of: dict[str, set[str]] = {}
    for row in rows:
        tasks_of.setdefault(row["image"], set()).add(row["task"])
    assert min(len(tasks) for tasks in tasks_of.values()) == 5


def test_answers_are_true_of_the_scene() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, range(100))
        by_shape = {item.shape: item for item in scene.items}
        found = {task.name: task.ask(scene, rng) for task in (*TASKS, *HELD_OUT)}
        words = {name: question.split() for name, (question, _) in found.items()}
        answers = {name: answer for name, (_, answer) in found.items()}
        assert answers["digit"] == str(scene.digit) == str(digit_scans()[1][scene.digit_image])
        assert answers["color"] == by_shape[words["color"][4]].color
        assert answers["where"] == place(by_shape[words["where"][3]].cell)
        color = words["count"][2]
        assert answers["count"] == NUMBERS[sum(item.color == color for item in scene.items)]
        color, shape = words["presence"][3:5]
        there = shape in by_shape and by_shape[shape].color == color
        assert answers["presence"] == ("yes" if there else "no")
        question = words["side"]
        assert {question[5], question[9]} in ({"top", "bottom"}, {"left", "right"})
        assert answers["side"] in {question[5], question[9]}
        assert answers["side"] in place(by_shape[question[2]].cell).split("-")
        shape, color = words["entailment"][1], words["entailment"][3]
        truth = "unknown" if shape not in by_shape else "true" if by_shape[shape].color == color else "false"
        assert answers["entailment"] == truth
        assert answers["digit_where"] == place(scene.digit_cell)
        cells = {place(item.cell): item.shape for item in scene.items}
        assert answers["shape_at"] == cells[words["shape_at"][3]]
        assert answers["color_at"] == by_shape[cells[words["color_at"][3]]].color
        assert answers["any_shape"] == ("yes" if words["any_shape"][3] in by_shape else "no")
        assert answers["small_or_large"] == by_shape[words["small_or_large"][2]].size
        assert answers["count_of"] == NUMBERS[sum(item.color == words["count_of"][4] for item in scene.items)]
        assert len({item.cell for item in scene.items} | {scene.digit_cell, scene.sign_cell}) == GRID * GRID


def test_splits_share_no_handwriting() -> None:
    total = len(digit_scans()[1])
    spans = [dataset.SCANS[split] for split in ("train", "validation", "test")]
    assert spans[0][1] == spans[1][0] and spans[1][1] == spans[2][0] and spans[2][1] == 1.0
    assert demo_backbone._first_held_out_scan() == int(dataset.SCANS["train"][1] * total)


def test_a_picture_of_one_cell_shows_that_cell_alone() -> None:
    scene = sample_scene(random.Random(1), range(10))
    whole, alone = np.asarray(draw_scene(scene)), np.asarray(draw_scene(scene, 1))
    assert (whole[:16, 16:] == alone[:16, 16:]).all()
    assert alone[16:].max() < 40 < whole[16:].max()


def test_questions_alone_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SPLITS", {"train": 200, "validation": 1, "test": 40})
    folder = dataset.make_dataset(tmp_path / "set")
    train, test = (load_conversations(str(folder / f"{split}.json")) for split in ("train", "test"))
    assert blind_baseline(list(train), list(test), "test")["mean_exact_match"] < 0.4


def test_the_backbone_is_an_ordinary_checkpoint_and_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CELL_STEPS", "SCENE_STEPS"):
        monkeypatch.setattr(demo_backbone, name, 2)
    monkeypatch.setattr(demo_backbone, "CELL_BATCH", 8)
    seen: list[tuple[int, int]] = []
    folders = [demo_backbone.make_backbone(tmp_path / name, lambda *s: seen.append(s)) for name in "ab"]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    assert seen[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert demo_backbone.make_backbone(folders[0]) == folders[0] and len(seen) == 8  # cached
    model = AutoModelForImageTextToText.from_pretrained(folders[0])
    assert 1e6 <= model.num_parameters() <= 2e6
    processor = AutoProcessor.from_pretrained(folders[0])
    assert processor.tokenizer.unk_token_id not in processor.tokenizer(_everything())["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing half-made is left


def _everything() -> str:
    rng = random.Random(5)
    scenes = [sample_scene(rng, range(1797)) for _ in range(50)]
    texts = [text for scene in scenes for task in (*TASKS, *HELD_OUT) for text in task.ask(scene, rng)]
    return " ".join([*texts, *(caption(scene, rng) for scene in scenes)])


def test_ready_made_batches_normalise_pixels_as_the_processor(processor: Any) -> None:
    image = draw_scene(sample_scene(random.Random(2), range(10)))
    own = demo_backbone._caption_batch(processor, [(image, "circle red .")])
    theirs = processor(images=[image], text=["<image> circle red . <eos>"], return_tensors="pt")
    assert (own["input_ids"] == theirs["input_ids"]).all()
    assert (own["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5
    assert (own["labels"] != -100).sum() == 4


def test_resolve_leaves_other_recipes_alone(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert resolve(recipe, None, Console()) is recipe
