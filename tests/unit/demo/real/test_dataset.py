"""The real data set: deterministic, of all kinds of rows, its test wordings unseen, not to be answered blind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qmixlora.data import load_conversations
from qmixlora.demo.real.dataset import make_real_dataset
from qmixlora.demo.real.tasks import HELD_OUT, SCENE_TASKS
from qmixlora.errors import UserError
from qmixlora.evaluation import blind_baseline

SMALL = {"train": 12, "validation": 1, "test": 4}
KINDS = {"handwriting", "text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_real_dataset(tmp_path_factory.mktemp("real") / "set", splits=SMALL)


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(json.loads((folder / f"{split}.json").read_text(encoding="utf-8")))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_same_seed_gives_the_same_real_data(tmp_path: Path) -> None:
    sizes = {"train": 2, "validation": 1, "test": 1}
    digests = [digest(make_real_dataset(tmp_path / name, seed, sizes)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]


def test_every_split_has_its_tasks(folder: Path) -> None:
    scenes = {task.name for task in SCENE_TASKS}
    expected = {
        "train": scenes | KINDS,
        "validation": scenes | KINDS,
        "test": scenes | KINDS,
        "paraphrased": scenes | {"handwriting"},  # an instruction has no other words
        "held_out": {task.name for task in HELD_OUT},
        "conversations": scenes,
    }
    assert {split: {row["task"] for row in rows_of(folder, split)} for split in expected} == expected


def test_every_row_is_read_as_a_conversation(folder: Path) -> None:
    for split in ("train", "conversations"):
        assert len(load_conversations(str(folder / f"{split}.json"))) == len(rows_of(folder, split))


def test_turns_of_a_conversation_belong_to_different_tasks(folder: Path) -> None:
    for split, count in (("train", SMALL["train"]), ("conversations", SMALL["test"] * len(SCENE_TASKS))):
        talks = [row for row in rows_of(folder, split) if len(row["conversations"]) > 2]
        tasks = [[turn["task"] for turn in row["conversations"] if turn["from"] == "gpt"] for row in talks]
        assert len(talks) == count and {len(own) for own in tasks} == {2, 3}
        assert all(len(set(own)) == len(own) for own in tasks)
        assert [own[-1] for own in tasks] == [row["task"] for row in talks]


def test_other_words_ask_the_same_of_the_same_image(folder: Path) -> None:
    test = [row for row in rows_of(folder, "test") if row["task"] != "text"]
    for before, after in zip(test, rows_of(folder, "paraphrased"), strict=True):
        asked, again = before["conversations"][0].pop("value"), after["conversations"][0].pop("value")
        assert before == after and asked != again


def test_no_handwriting_of_the_test_is_trained_on(folder: Path) -> None:
    scans = {split: {row["image"] for row in rows_of(folder, split) if row["task"] == "handwriting"} for split in SMALL}
    assert not scans["train"] & scans["test"] and all("digit-" in image for image in scans["test"])


def test_questions_in_english_alone_do_not_answer(tmp_path: Path) -> None:
    made = make_real_dataset(tmp_path / "set", splits={"train": 100, "validation": 1, "test": 20})
    train, test = (list(load_conversations(str(made / f"{split}.json"))) for split in ("train", "test"))
    seen = [row for row in test if row["task"] != "text"]
    assert blind_baseline(train, seen, "test").mean < 0.4


def test_a_real_data_set_with_a_split_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").touch()
    with pytest.raises(UserError, match=r"conversations.json is missing"):
        make_real_dataset(tmp_path)
