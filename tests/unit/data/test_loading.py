"""Files become conversations; a broken one is named, with the place in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from qmixlora.data import Collator, load_conversations
from qmixlora.errors import UserError

from .helpers import GPT, HUMAN, Write

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
        assert load_conversations(str(tmp_path / other))[0] == first


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
        (broken_text("odd.json", json.dumps([GOOD, 3])), ("JSON object", "sample 1")),
        (broken_text("format.json", json.dumps([{"conversations": [HUMAN]}])), ("no answer", "sample 0")),
        (naming_image("gone.png"), ("missing", "gone.png")),
        (naming_image("junk.png", b"no image"), ("cannot be read", "junk.png")),
        (broken_text("bad.parquet", "no parquet"), ("Cannot read", "bad.parquet")),
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
