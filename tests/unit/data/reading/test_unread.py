"""Pictures under keys that are not read are noticed by what they are, in dialogues and in tables alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.data.formats import FormatError
from qmixlora.data.reading.loading import load
from qmixlora.data.reading.rows import Reading, Sample, to_sample
from qmixlora.recipe import Columns

from ..helpers import GPT

ASKED = {"from": "human", "value": "which colour ?"}
PNG = b"\x89PNG\r\n\x1a\n"
DIALOGUE = {"conversations": [ASKED, GPT]}
TABLE = {"q": "which colour ?", "a": "red"}
PICTURES: list[dict[str, Any]] = [
    {"screenshot": "a.png"},
    {"media": ["a b.JPG"]},
    {"visual": "http://there/a.webp?size=3"},
    {"path": {"bytes": PNG, "path": None}},
    {"file": {"bytes": None, "path": "a.png"}},
    {"attachments": [{"type": "image", "path": "a.png"}]},
    {"metadata": {"image": "a.png", "width": 3}},
    {"metadata": {"views": ["a.png"]}},
    {"drawn": "data:image/png;base64,aaaa"},
    {"raw": PNG},
    {"photo": "000000033471"},
]
NO_PICTURES: list[dict[str, Any]] = [
    {"id": "a.png", "source": "b.png", "image_id": "7"},
    {"path": "a.txt", "url": "http://there/a.html", "note": "See a.png.\nThere it is.", "more": ["3.14", "U.S."]},
    {"sound": {"bytes": b"RIFF....WAVE", "path": "a.wav"}, "scores": [0.5], "metadata": {"license": "MIT"}},
    {"picture": None, "image_path": " ", "media": [], "attachments": [{"path": None}]},
]


def read(row: dict[str, Any], *, image: Any = None) -> Sample:
    """A row of a table, or a dialogue."""
    columns = Columns(question="q", answer="a", image=image) if "q" in row else None
    return to_sample(row, Reading(columns=columns, template="{question}"))


@pytest.mark.parametrize("beside", PICTURES, ids=str)
def test_a_row_that_would_be_learned_blind_is_refused(beside: dict[str, Any]) -> None:
    [key] = beside
    for row in ({**DIALOGUE, **beside}, {"conversations": [{**ASKED, **beside}, GPT]}):
        with pytest.raises(FormatError, match=f"a picture in '{key}', which is not read; name it in 'image'"):
            read(row)
    for named in (None, "image"):
        with pytest.raises(FormatError, match=f"'{key}', which is not read; name it in data.columns.image"):
            read({**TABLE, "image": None, **beside}, image=named)


@pytest.mark.parametrize("beside", NO_PICTURES, ids=str)
def test_what_is_no_picture_is_ignored(beside: dict[str, Any]) -> None:
    for row in (DIALOGUE, TABLE):
        assert read({**row, **beside}) == read(row)


@pytest.mark.parametrize("key", ["image", "images"])
def test_a_table_whose_picture_is_not_named_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match=f"a picture in '{key}', which is not read; name it in data.columns.image"):
        read({**TABLE, key: "000000033471"})


@pytest.mark.parametrize("beside", [{"image_2": "b/a.png"}, {"images": ["a.png", "b.png"]}], ids=str)
def test_one_more_picture_of_a_table_is_refused(beside: dict[str, Any]) -> None:
    [key] = beside
    with pytest.raises(FormatError, match=f"a picture in '{key}', which is not read"):
        read({**TABLE, "image": "a.png", **beside}, image="image")
    same = read({**TABLE, "image": "a.png", "images": ["a.png"]}, image="image")
    assert same.images == ["a.png"] and same.unread == []


@pytest.mark.parametrize(
    ("image", "beside", "told"),
    [
        ("train/a.png", {"coco_url": "http://there/a.png", "image_path": "/data/a.png", "file_name": "a.png"}, []),
        ({"bytes": PNG, "path": None}, {"image_url": "http://there/a.png"}, []),
        ({"bytes": PNG, "path": "a.png"}, {"image_url": "http://there/a.png"}, []),
        ("a.png", {"screenshot": "b.png"}, ["screenshot"]),
        ("a.png", {"media": ["a.png", "b.png"]}, ["media"]),
        ("a.png", {"depth": {"bytes": PNG, "path": None}}, ["depth"]),
        ({"bytes": PNG, "path": None}, {"depth": {"bytes": PNG, "path": None}}, ["depth"]),
        ("a.png", {"metadata": {"before": "b.png", "after": "c.png"}}, ["metadata"]),
    ],
)
def test_another_picture_beside_one_that_is_read_is_told(image: Any, beside: dict[str, Any], told: list[str]) -> None:
    assert read({**DIALOGUE, "image": image, **beside}).unread == told
    assert read({**TABLE, "picture": image, **beside}, image="picture").unread == told


def test_pictures_that_words_name_are_read() -> None:
    asked = {"from": "human", "value": "Picture 1: <img>a.png</img>\nwhich colour ?"}
    assert read({"conversations": [asked, GPT], "image_path": "a.png"}).images == ["a.png"]


def test_pictures_that_are_not_read_are_counted_by_their_keys(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [{**DIALOGUE, "image": "a.png", **({"screenshot": "b.png"} if at else {})} for at in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    [doubt] = load(str(tmp_path / "d.json"), "train", None, Reading()).refused.doubts
    assert doubt.startswith("2 samples hold a picture in 'screenshot'") and "name it in 'image'" in doubt
