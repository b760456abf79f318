"""Columns of plain tables by their usual names, in every form of data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from qmixlora.data import IMAGE, load_conversations, usual_columns
from qmixlora.data.reading.usual import Usual, _of_rows
from qmixlora.recipe import Columns, validate
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
    ("made", "expected", "unused"),
    [
        (as_csv, {"question": "Prompt", "answer": "Response", "image": "Image Path"}, ["id"]),
        (as_json_lines, {"question": "query", "answer": "answers", "image": "file_name"}, []),
        (as_parquet, {"question": "instruction", "answer": "label", "image": "image"}, []),
        (as_image_folder, {"question": "question", "answer": "answer", "image": "image"}, []),
    ],
)
def test_usual_names_are_known_in_every_form_and_the_rows_are_read(
    made: Callable[[Path], str], expected: dict[str, str], unused: list[str], tmp_path: Path
) -> None:
    source = made(tmp_path)
    assert usual_columns(source) == Usual(expected, None, unused)
    rows = load_conversations(source, columns=Columns.model_validate(expected), template=OPEN)
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
    assert _of_rows([row], {}, None) is None
    assert _of_rows([{"id": 1}, row], {}, None) is None


@pytest.mark.parametrize(("choices", "known"), [(["a", "b"], "choices"), (4, None), (None, None)])
def test_options_are_taken_where_they_are_options(choices: object, known: str | None) -> None:
    usual = _of_rows([{"question": "?", "answer": "a", "choices": choices}], {}, None)
    assert usual is not None and usual.columns.get("options") == known
    assert usual.unused == (["choices"] if choices == 4 else [])


def asked(folder: Path, *rows: Mapping[str, Any], **settled: Any) -> list[str]:
    """The questions of rows as their usual columns put them together, those beside that are settled."""
    (folder / "data.json").write_text(json.dumps(rows))
    template = settled.pop("template", None)
    usual = usual_columns(str(folder / "data.json"), None, settled, template)
    assert usual is not None
    read = {"train": "embedded.json", "columns": {**usual.columns, **settled}, "template": usual.template}
    data = validate({"model": {"id": "x"}, "data": read}, "here").data
    found = load_conversations(
        str(folder / "data.json"), columns=data.columns, template=data.question_template(), image_root=str(folder)
    )
    return [row["turns"][0]["text"].replace(IMAGE, "<image>") for row in found]


def test_an_instruction_has_what_it_is_about_below_it(tmp_path: Path) -> None:
    told = {"instruction": "Into German.", "output": "x"}
    rows = {**told, "input": ""}, {**told, "input": "The cat sleeps."}, told, {**told, "input": None}
    assert asked(tmp_path, *rows) == ["Into German.", "Into German.\nThe cat sleeps.", "Into German.", "Into German."]


@pytest.mark.parametrize("name", ["context", "passage", "hint", "system", "System Prompt"])
def test_what_a_question_is_about_stands_above_it(name: str, tmp_path: Path) -> None:
    assert asked(tmp_path, {"question": "Who?", name: "Ann is here.", "answer": "Ann"}) == ["Ann is here.\nWho?"]


@pytest.mark.parametrize(
    "names",
    ["ABCD", *([f"{name}{end}" for end in ends] for name in ("option_", "Choice ") for ends in ("abcd", "1234"))],
)
def test_options_in_columns_of_their_own_are_taken(names: Sequence[str], tmp_path: Path) -> None:
    row = {"question": "Which?", "hint": "Left.", **dict(zip(names, ["red", "blue", "lime", ""], strict=True))}
    first = {"question": "Why?", "answer": "so", **dict.fromkeys(names)}
    rows = first, {**row, "answer": "B"}
    assert asked(tmp_path, *rows) == ["Why?", "Left.\nWhich?\nA. red\nB. blue\nC. lime"]


@pytest.mark.parametrize("name", ["image_{}", "Image {}", "image{}"])
def test_pictures_in_numbered_columns_are_taken(name: str) -> None:
    """As MMMU has them: later ones are empty in most rows."""
    first, second, third = (name.format(number) for number in (1, 2, 3))
    row = {"question": "Which?", "answer": "a", second: "2.png", first: "1.png", third: None}
    found = _of_rows([row, {**row, third: "3.png"}], {}, None)
    assert found == Usual({"question": "question", "answer": "answer", "image": [first, second, third]}, None, [])


def test_what_the_first_row_lacks_is_taken_too(tmp_path: Path) -> None:
    [name, _] = draw(tmp_path)
    first = {"question": "Who?", "answer": "Ann", "options": None}
    rows = first, {"question": "Which?", "answer": 0, "image": name, "options": ["a", "b"]}
    assert asked(tmp_path, *rows) == ["Who?", "<image>\nWhich?\nA. a\nB. b"]


def test_what_is_settled_is_not_named_again(tmp_path: Path) -> None:
    row = {"instruction": "Look.", "input": "Who?", "hint": "Left.", "output": "Ann"}
    assert asked(tmp_path, row, question="input") == ["Left.\nWho?"]
    assert asked(tmp_path, row, template="{input} {question}") == ["Who? Look."]


def test_columns_that_are_not_used_are_named() -> None:
    row = {"id": 3, "question": "?", "context": {"title": ["x"]}, "answer": "!", "empty": "", "task": "a"}
    usual = _of_rows([{"question": "?"}, row], {}, None)
    assert usual is not None and usual.unused == ["id", "context"]
