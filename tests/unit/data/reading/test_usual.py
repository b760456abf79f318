"""Columns of plain tables by their usual names, in every form of data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import pytest
from PIL import Image

from qmixlora.data import load_conversations, usual_columns
from qmixlora.data.reading.usual import _of_row
from qmixlora.recipe import Columns
from qmixlora.recipe.template import OPEN

ANSWERS = ("red", "blue")


def draw(folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    for index, color in enumerate(ANSWERS):
        Image.new("RGB", (24, 24), color).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(len(ANSWERS))]


def as_csv(folder: Path) -> str:
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", "Prompt", "Response", "id"])
        writer.writerows(
            (name, "which colour ?", answer, 1) for name, answer in zip(draw(folder), ANSWERS, strict=True)
        )
    return str(folder / "data.csv")


def as_json_lines(folder: Path) -> str:
    rows = [{"file_name": n, "query": "which ?", "answers": [a, a]} for n, a in zip(draw(folder), ANSWERS, strict=True)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "data.jsonl")


def as_parquet(folder: Path) -> str:
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in draw(folder)]
    rows = {"image": images, "instruction": ["which ?"] * 2, "label": list(ANSWERS)}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def as_image_folder(folder: Path) -> str:
    names = draw(folder / "train")
    rows = [{"file_name": n, "question": "which ?", "answer": a} for n, a in zip(names, ANSWERS, strict=True)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (as_csv, Columns(question="Prompt", answer="Response", image="Image Path")),
        (as_json_lines, Columns(question="query", answer="answers", image="file_name")),
        (as_parquet, Columns(question="instruction", answer="label", image="image")),
        (as_image_folder, Columns(question="question", answer="answer", image="image")),
    ],
)
def test_usual_names_are_known_in_every_form_and_the_rows_are_read(
    made: Callable[[Path], str], expected: Columns, tmp_path: Path
) -> None:
    source = made(tmp_path)
    columns = usual_columns(source)
    assert columns == expected
    rows = load_conversations(source, columns=columns, template=OPEN)
    assert [row["turns"][-1]["text"] for row in rows] == list(ANSWERS)
    assert all(len(row["images"]) == 1 for row in rows)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "?"}], "question": "?", "answer": "!"},
        {"image": "1.png", "text": "a caption"},
    ],
)
def test_dialogues_and_tables_without_a_question_are_not_guessed_at(row: Mapping[str, object]) -> None:
    assert _of_row(row) is None


@pytest.mark.parametrize(("choices", "known"), [(["a", "b"], "choices"), (4, None), (None, None)])
def test_options_are_taken_where_they_are_options(choices: object, known: str | None) -> None:
    columns = _of_row({"question": "?", "answer": "a", "choices": choices})
    assert columns is not None and columns.options == known
