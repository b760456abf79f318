"""The embedded data set: deterministic, and not to be answered blind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qmixlora.data import load_conversations
from qmixlora.demo import dataset
from qmixlora.demo.scenes import digit_scans
from qmixlora.demo.tasks import HELD_OUT, TASKS
from qmixlora.errors import UserError
from qmixlora.evaluation import blind_baseline


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def rows_of(data: Path, split: str) -> list[dict[str, Any]]:
    return list(json.loads((data / f"{split}.json").read_text()))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SPLITS", {"train": 3, "validation": 1, "test": 1})
    digests = [digest(dataset.make_dataset(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]


def test_paraphrases_have_the_image_and_answer_of_the_test_split_in_known_words(data: Path) -> None:
    vocabulary = {word for row in rows_of(data, "train") for word in row["conversations"][0]["value"].split()}
    for before, after in zip(rows_of(data, "test"), rows_of(data, "paraphrased"), strict=True):
        asked, again = before["conversations"][0].pop("value"), after["conversations"][0].pop("value")
        assert before == after
        assert asked != again and set(again.split()) <= vocabulary | set(asked.split())


def test_a_data_set_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").touch()
    with pytest.raises(UserError, match=r"validation.json.*is missing"):
        dataset.make_dataset(tmp_path)


def test_a_split_has_all_of_its_tasks(data: Path) -> None:
    assert {row["task"] for row in rows_of(data, "train")} == {task.name for task in TASKS} and len(TASKS) >= 8
    assert {row["task"] for row in rows_of(data, "held_out")} == {task.name for task in HELD_OUT}


def test_five_tasks_share_an_image(data: Path) -> None:
    tasks_of: dict[str, set[str]] = {}
    for row in rows_of(data, "train"):
        tasks_of.setdefault(row["image"], set()).add(row["task"])
    assert min(len(tasks) for tasks in tasks_of.values()) == 5


def test_splits_share_no_handwriting() -> None:
    spans = [dataset.SCANS[split] for split in ("train", "validation", "test")]
    assert spans[0][1] == spans[1][0] and spans[1][1] == spans[2][0] and spans[2][1] == 1.0


def test_the_backbone_sees_no_handwriting_but_that_of_the_training_split() -> None:
    from qmixlora.demo import backbone

    assert backbone.first_held_out_scan() == int(dataset.SCANS["train"][1] * len(digit_scans()[1]))


def test_questions_alone_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SPLITS", {"train": 200, "validation": 1, "test": 40})
    folder = dataset.make_dataset(tmp_path / "set")
    train, test = (load_conversations(str(folder / f"{split}.json")) for split in ("train", "test"))
    assert blind_baseline(list(train), list(test), "test").mean < 0.4
