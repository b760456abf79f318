"""Whatever people bring becomes a right conversation, or a refusal with its place; never a traceback."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmixlora.data import IMAGE
from qmixlora.data.formats import RESERVED, FormatError
from qmixlora.data.reading.json_files import Row
from qmixlora.data.reading.loading import read_conversations
from qmixlora.data.reading.looks import ImageLooks
from qmixlora.data.reading.rows import Reading, Sample, to_sample
from qmixlora.data.reading.sources import Source
from qmixlora.errors import UserError
from qmixlora.recipe import MAX_PIXELS, Columns, Data

NASTY = ["<image>", "a <image> b", "", " \n", "<video>", "\ud800", IMAGE, "A", "1", "user", "gpt", "system", "image"]
SCALARS = st.sampled_from([None, True, 0, 1, -3, 0.5, float("nan"), float("inf"), b"x", *NASTY]) | st.text(max_size=5)
ODD = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NASTY), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters=RESERVED), min_size=1, max_size=8).filter(str.strip)
IMAGES: list[Any] = ["x.png", {"path": "x.png"}, {"bytes": b"x", "path": None}, {"url": "x"}]
PICTURES = st.lists(st.sampled_from(IMAGES), max_size=2)


@st.composite
def dialogues(draw: st.DrawFn) -> dict[str, Any]:
    """Good rows: pictures where marks, parts or nothing say that they stand."""
    rounds, pictures, way = draw(st.integers(1, 3)), draw(PICTURES), draw(st.sampled_from(["marks", "parts", "none"]))
    speaker, said = draw(st.sampled_from([("from", "value"), ("role", "content")]))
    turns: list[dict[str, Any]] = [{speaker: "system", said: draw(WORDS)}] * draw(st.booleans())
    for index in range(rounds):
        content: Any = draw(WORDS)
        if index == rounds - 1 and way == "marks":
            content = "<image>" * len(pictures) + content
        elif index == rounds - 1 and way == "parts":
            content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": content}]
        turns += [{speaker: "user", said: content}, {speaker: "assistant", said: draw(WORDS | st.integers())}]
    return {draw(st.sampled_from(["conversations", "messages"])): turns, "images": pictures, "task": draw(WORDS)}


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Good rows of a table."""
    options = draw(st.lists(WORDS, min_size=2, max_size=4, unique=True))
    answer = draw(st.sampled_from(options) | st.lists(st.sampled_from(options), min_size=1, max_size=3))
    return {"q": draw(WORDS), "a": answer, "o": options, "i": draw(PICTURES), "t": draw(WORDS)}


@st.composite
def spoiled(draw: st.DrawFn, good: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """Rows in which nothing, one or two values (at any depth) are replaced, removed or doubled."""
    row = copy.deepcopy(draw(good))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        inside: Any = row
        while True:
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            if not isinstance(inside[key], dict | list) or not inside[key] or draw(st.integers(0, 3)) == 0:
                break
            inside = inside[key]
        way = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if way == "replace":
            inside[key] = draw(ODD)
        elif way == "double" and isinstance(inside, list):
            inside.insert(key, inside[key])
        elif len(row) > 1 or inside is not row:
            del inside[key]
    return row


def check(sample: Sample) -> None:
    roles = [turn["role"] for turn in sample.turns]
    start = roles[0] == "system"
    assert roles[start:] == ["user", "assistant"] * (len(roles[start:]) // 2) and len(roles) > start
    for turn in sample.turns:
        assert turn["text"].strip() and turn["text"].encode()
        assert not any(character in turn["text"].replace(IMAGE, "") for character in RESERVED)
        assert turn["role"] == "user" or IMAGE not in turn["text"]
    assert sum(turn["text"].count(IMAGE) for turn in sample.turns) == len(sample.images)
    assert all(isinstance(image, str) or image["bytes"] for image in sample.images)
    assert sample.task.strip()
    assert not sample.references or sample.turns[-1]["text"] in sample.references


def sample_or_refusal(row: dict[str, Any], reading: Reading) -> Sample | None:
    try:
        sample = to_sample(row, reading)
    except FormatError as error:
        assert str(error).startswith(("has ", "starts ", "ends ")), "it completes 'The sample ...'"
        return None
    check(sample)
    return sample


@settings(max_examples=600)
@given(spoiled(dialogues()))
def test_a_dialogue_of_any_kind_is_right_or_refused(row: dict[str, Any]) -> None:
    sample_or_refusal(row, Reading())


@settings(max_examples=500)
@given(spoiled(tables()), st.booleans(), st.booleans(), st.sampled_from([None, "{question} {image}", "{question}"]))
def test_columns_of_any_kind_are_right_or_refused(
    row: dict[str, Any], options: bool, task: bool, template: str | None
) -> None:
    names: dict[str, Any] = {"options": "o"} if options and template is None else {}
    columns = Columns(question="q", answer="a", image="i", task="t" if task else None, **names)
    data = Data(train="x", columns=columns, template=template)
    sample_or_refusal(row, Reading(columns=columns, template=data.question_template()))


GOOD_ROWS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)
FORMS = ["json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz"]
COLUMNS = Reading(columns=Columns(question="q", answer="a"), template="{question}")


def content(rows: list[dict[str, Any]], form: str) -> bytes:
    name, _, zipped = form.partition(".")
    if name == "json":
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    elif name == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, ["q", "a"], delimiter="\t" if name == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    return gzip.compress(text.encode()) if zipped else text.encode()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def results(path: Path) -> list[Any]:
    return list(
        read_conversations(Source.find(str(path), "train").rows(), COLUMNS, ImageLooks(path.parent, MAX_PIXELS))
    )


@settings(max_examples=300)
@given(rows=GOOD_ROWS, form=st.sampled_from(FORMS))
def test_text_comes_through_every_container_as_it_stands(rows: list[tuple[str, str]], form: str, folder: Path) -> None:
    path = folder / f"good.{form}"
    path.write_bytes(content([{"q": question, "a": answer} for question, answer in rows], form))
    for (question, answer), result in zip(rows, results(path), strict=True):
        if isinstance(result, UserError):
            assert question.strip() == "<image>"
        else:
            assert [turn["text"] for turn in result["turns"]] == [question, answer]


@settings(max_examples=500)
@given(
    rows=GOOD_ROWS,
    form=st.sampled_from(FORMS),
    at=st.floats(0, 1),
    put=st.binary(max_size=3) | st.sampled_from([b'"', b"\n", b"{", b"]", b",", b"\xff", b"NaN", b"null", b"\\ud800"]),
    cut=st.sampled_from([0, 0, 1, 5, 10_000]),
)
def test_a_file_with_a_mistake_anywhere_is_right_or_refused_with_its_name(
    rows: list[tuple[str, str]], form: str, at: float, put: bytes, cut: int, folder: Path
) -> None:
    path = folder / f"bad.{form}"
    whole = content([{"q": question, "a": answer} for question, answer in rows], form)
    place = round(at * len(whole))
    path.write_bytes(whole[:place] + put + whole[place + cut :])
    try:
        for result in results(path):
            assert not isinstance(result, UserError) or path.name in result.where
    except UserError as error:
        assert path.name in error.where


@given(st.lists(ODD, max_size=3))
def test_rows_that_are_anything_are_refused_with_their_place(rows: list[Any]) -> None:
    read = (Row(f"f, line {index}", row) for index, row in enumerate(rows))
    for result in read_conversations(read, COLUMNS, ImageLooks(Path(), MAX_PIXELS)):
        assert isinstance(result, UserError) and result.where.startswith("f, line ")
