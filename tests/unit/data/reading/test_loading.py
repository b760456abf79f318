"""Files become conversations; a broken one is named, with the place in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import yaml

from qmixlora.data import IMAGE, Collator, load_conversations
from qmixlora.data.reading.loading import load
from qmixlora.data.reading.rows import Reading
from qmixlora.errors import UserError
from qmixlora.recipe import Columns

from ..helpers import GPT, HUMAN, Write

GOOD = {"conversations": [{"from": "human", "value": "hi"}, GPT]}


def test_llava_messages_and_parquet_give_the_same_conversation(write_json: Write, tmp_path: Path, image: str) -> None:
    llava = {"image": image, "conversations": [HUMAN, GPT], "task": "digit"}
    text = {"type": "text", "text": "\nwhat digit is written ?"}
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": image}, text]},
            {"role": "assistant", "content": "seven"},
        ],
        "task_name": "digit",
    }
    (tmp_path / "b.jsonl").write_text(json.dumps(chat) + "\n\n", encoding="utf-8")
    datasets.Dataset.from_list([llava]).to_parquet(str(tmp_path / "c.parquet"))
    first = load_conversations(str(write_json("a.json", [llava])))[0]
    assert first["task"] == "digit" and first["images"][0]["path"].endswith("p.png")
    assert [turn["role"] for turn in first["turns"]] == ["user", "assistant"]
    for other in ("b.jsonl", "c.parquet"):
        assert {**load_conversations(str(tmp_path / other))[0], "origin": first["origin"]} == first


def test_images_inside_parquet_are_read(tmp_path: Path, image: str, processor: object) -> None:
    whole = {"bytes": (tmp_path / image).read_bytes(), "path": None}
    row = {"image": whole, "conversations": [HUMAN, GPT], "task": "t"}
    data = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    data.to_parquet(str(tmp_path / "d.parquet"))
    rows = load_conversations(str(tmp_path / "d.parquet"))
    assert Collator(processor, 64)([rows[0]])["pixel_values"].shape == (1, 3, 32, 32)


def test_image_paths_are_taken_from_the_root_that_the_recipe_names(
    write_json: Write, tmp_path: Path, image: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = write_json("elsewhere/a.json", [{"image": image, "conversations": [HUMAN, GPT]}])
    [row] = load_conversations(str(source), image_root=str(tmp_path))
    assert row["images"][0]["path"] == str((tmp_path / image).resolve())


def broken_text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return make


def naming_image(name: str, content: bytes | None = None) -> Callable[[Path], Path]:
    """Makes a data file that names an image with this content, or one that is not there."""

    def make(folder: Path) -> Path:
        if content is not None:
            (folder / name).write_bytes(content)
        return broken_text("a.json", json.dumps([{"image": name, "conversations": [HUMAN, GPT]}]))(folder)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.json", ("no such data file", "none.json")),
        (broken_text("broken.json", '[\n{"a": 1},\n{"a" 2}\n]'), ("Broken JSON", "line 3")),
        (broken_text("broken.jsonl", json.dumps(GOOD) + "\n{oops}\n"), ("Broken JSON", "line 2")),
        (broken_text("dict.json", '{"a": 1}'), ("JSON list",)),
        (broken_text("empty.json", "[]"), ("empty",)),
        (broken_text("odd.json", json.dumps([GOOD, 3])), ("JSON object", "row 1")),
        (broken_text("format.json", json.dumps([{"conversations": [HUMAN]}])), ("no answer", "row 0")),
        (naming_image("gone.png"), ("missing", "gone.png")),
        (naming_image("junk.png", b"no image"), ("cannot be read", "junk.png")),
        (broken_text("bad.parquet", "no parquet"), ("broken", "bad.parquet")),
    ],
    ids=["absent", "json", "jsonl", "dict", "empty", "number", "format", "no image", "junk image", "parquet"],
)
def test_a_broken_source_is_named_with_the_place_in_it(
    tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        load_conversations(str(make(tmp_path)))
    for word in words:
        assert word in str(caught.value)


def lines_of(folder: Path, *rows: object) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "a.jsonl")


BAD = {"conversations": [HUMAN]}


def test_a_fault_of_many_samples_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their count and the first place, alike whether they stop a run or are left out."""
    rows = lines_of(tmp_path, GOOD, *[BAD] * 41, 3, BAD)
    with pytest.raises(UserError) as caught:
        load_conversations(rows)
    told = caught.value.what.splitlines()
    assert told[0] == "43 samples cannot be used:" and len(told) == 3
    assert told[1] == f"    42 x The sample has no answer to learn from. First: {rows}, line 2"
    assert told[2] == f"    1 x A sample is a JSON object. First: {rows}, line 43"
    assert "data.on_bad_sample: skip" in caught.value.fix
    load_conversations(rows, on_bad_sample="skip")
    assert capsys.readouterr().err.splitlines()[1:] == told[1:]


def test_of_many_faults_ten_are_told(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": name, "content": "a"}]} for name in "abcdefghijklmn"]
    with pytest.raises(UserError) as caught:
        load_conversations(lines_of(tmp_path, GOOD, *rows, rows[-1]))
    told = caught.value.what.splitlines()
    assert len(told) == 12 and "2 x The sample has the role 'n'" in told[1] and told[-1] == "    and 4 more"


def test_mistakes_of_the_file_of_the_format_and_of_pictures_are_listed_together(tmp_path: Path) -> None:
    source = lines_of(tmp_path, BAD, {"image": "gone.png", **GOOD}, {"conversations": [HUMAN, GPT]})
    with Path(source).open("a") as file:
        file.write("{oops}\n")
    with pytest.raises(UserError, match="4 samples") as caught:
        load_conversations(source)
    for word in ("no answer", "gone.png", "marks and 0 images", "Broken JSON", "line 4"):
        assert word in caught.value.what


def test_bad_samples_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines_of(tmp_path, GOOD, BAD, 3, GOOD)
    rows = load_conversations(source, on_bad_sample="skip")
    said = capsys.readouterr()
    assert len(rows) == 2 and not said.out
    assert "2 of 4 samples left out" in said.err and "line 2: The sample has no answer" in said.err


def test_a_caller_learns_how_many_samples_were_left_out(tmp_path: Path) -> None:
    loaded = load(lines_of(tmp_path, GOOD, BAD, GOOD), "train", None, Reading())
    assert len(loaded.rows) == 2 and loaded.refused.count == 1


def test_nothing_but_bad_samples_is_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 samples cannot be used") as caught:
        load_conversations(lines_of(tmp_path, BAD, BAD), on_bad_sample="skip")
    assert "there are no others" in caught.value.fix and "skip" not in caught.value.fix


@pytest.mark.parametrize("several", [False, True])
def test_columns_of_files_are_images(tmp_path: Path, image: str, several: bool) -> None:
    content = (tmp_path / image).read_bytes()
    row = {"images": [content, content]} if several else {"image": content}
    datasets.Dataset.from_list([{**row, **GOOD}]).to_parquet(str(tmp_path / "d.parquet"))
    [read] = load_conversations(str(tmp_path / "d.parquet"))
    assert [file["bytes"] for file in read["images"]] == [content] * (1 + several)


def test_images_beside_messages_in_parquet_are_read(tmp_path: Path, image: str) -> None:
    whole = {"bytes": (tmp_path / image).read_bytes(), "path": None}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what ?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    data = datasets.Dataset.from_list([{"images": [whole], "messages": said}])
    data.cast_column("images", datasets.List(datasets.Image())).to_parquet(str(tmp_path / "d.parquet"))
    [row] = load_conversations(str(tmp_path / "d.parquet"))
    assert [file["bytes"] for file in row["images"]] == [whole["bytes"]] and row["turns"][0]["text"] == f"{IMAGE}what ?"


def test_a_table_with_columns_is_read_with_all_its_answers(tmp_path: Path, image: str) -> None:
    table = datasets.Dataset.from_list([{"q": "what ?", "a": ["x", "y", "y"], "i": image}])
    table.to_parquet(str(tmp_path / "t.parquet"))
    columns = Columns(question="q", answer="a", image="i")
    [row] = load_conversations(str(tmp_path / "t.parquet"), columns=columns, template="{question} !")
    assert row["references"] == ["x", "y", "y"]
    assert [turn["text"] for turn in row["turns"]] == [f"{IMAGE}\nwhat ? !", "y"]


def test_a_column_that_no_row_has_is_named_with_those_that_are_there(write_json: Write, image: str) -> None:
    rows = [{"q": "?", "a": "!"}, {"q": "?", "a": "!", "picture": image}]
    source = str(write_json("a.json", rows))
    found = load_conversations(
        source, columns=Columns(question="q", answer="a", image="picture"), template="{question}"
    )
    assert [len(row["images"]) for row in found] == [0, 1]
    with pytest.raises(UserError, match=r"(?s)No row has the column 'pictur'.*'q', 'a', 'picture'"):
        load_conversations(source, columns=Columns(question="q", answer="a", image="pictur"), template="{question}")


def test_the_columns_of_a_table_are_proposed_as_its_columns_are_called(write_json: Write) -> None:
    row = {"Question": "which ?", "hint": "look", "A": "red", "B": "blue", "answer": "A", "image": None}
    with pytest.raises(UserError) as caught:
        load_conversations(str(write_json("a.json", [row])))
    [hint] = re.findall(r"set data.columns: (.*) and data.template: (.*)\.", caught.value.what)
    columns, template = yaml.safe_load(hint[0]), json.loads(hint[1])
    found = load_conversations(str(write_json("a.json", [row])), columns=Columns(**columns), template=template)
    assert found[0]["turns"][0]["text"] == "look\nwhich ?\nA. red\nB. blue"


@pytest.mark.parametrize("task", [" count", "count\t", ["count "]])
def test_white_space_around_a_task_is_not_its_name(write_json: Write, task: object) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    own = [turns[0], {**turns[1], "task": " count "}]
    rows = [{"messages": turns, "task": task}, {"messages": own}]
    assert load_conversations(str(write_json("a.json", rows)))["task"] == ["count", "count"]
