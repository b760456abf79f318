"""Whatever names an image is found, decoded or refused in words."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from qmixlora.data import load_conversations
from qmixlora.data.images.files import locate
from qmixlora.data.images.opening import open_images
from qmixlora.errors import UserError

from ..helpers import GPT, HUMAN, Write

ORIGIN = "data.json, sample 3"


@pytest.fixture
def content(tmp_path: Path, image: str) -> bytes:
    return (tmp_path / image).read_bytes()


def is_the_image(file: Any) -> bool:
    [opened] = open_images([file])
    return opened.size == (40, 30) and opened.getpixel((0, 0)) == (200, 10, 10)


@pytest.mark.parametrize("name", ["p.png", "a b%20ü#?.png", "data:1.png", "-x", "~.png", 'it\'s "one".png', "новый\n"])
def test_a_file_of_any_name_is_found(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    for given in (name, str(tmp_path / name), {"path": name, "bytes": None}, {"url": name}, tmp_path / name):
        assert locate(given, tmp_path, ORIGIN) == {"path": str(tmp_path / name), "bytes": None}


@pytest.mark.parametrize("name", ["p.png", "a b%20ü.png"])
def test_a_file_address_is_read_as_it_stands_and_escaped(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    whole = tmp_path / name
    for given in (f"file://{whole}", f"file://localhost{quote(str(whole))}", f"file:{whole}", f"FILE://{whole}"):
        assert locate(given, tmp_path, ORIGIN)["path"] == str(whole)
    assert locate(f"file://{name}", tmp_path, ORIGIN)["path"] == str(whole)


def test_bytes_are_read_from_every_kind_of_row(tmp_path: Path, content: bytes) -> None:
    text = base64.b64encode(content).decode()
    safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    lines = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    for given in (
        content,
        bytearray(content),
        {"bytes": content, "path": "nowhere.png"},
        {"bytes": content},
        f"data:image/png;base64,{text}",
        f"DATA:;charset=utf-8;base64,{safe}",
        {"url": f"data:image/jpeg;base64,{quote(text)}"},
        {"image_url": {"url": f"data:image/png;base64,{lines}"}},
        f"data:image/png,{quote(content)}",
        text,
        safe,
        lines,
    ):
        file = locate(given, tmp_path, ORIGIN)
        assert file["bytes"] == content and is_the_image(file) and ORIGIN in str(file["path"])


def test_base64_that_looks_like_a_path_is_decoded(tmp_path: Path) -> None:
    from ..image_writing import drawn, encoded

    content = encoded(drawn("RGB", [(1, 2, 3)]), "JPEG")["bytes"] or b""
    text = base64.b64encode(content).decode()
    assert text.startswith("/9j/") and locate(text, tmp_path, ORIGIN)["bytes"] == content


def test_text_that_is_a_file_is_never_taken_for_base64(tmp_path: Path, content: bytes) -> None:
    name = base64.b64encode(content).decode()[:200].replace("/", "_")
    (tmp_path / name).write_bytes(content)
    assert locate(name, tmp_path, ORIGIN)["path"] == str(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.png", "is missing"),
        ("p.png/x.png", "is missing"),
        ("images/without_any_extension_at_all", "is missing"),
        ("", "empty path"),
        (".", "is a folder"),
        ("pipe", "no ordinary file"),
        ("zero.png", r"is empty \(0 bytes\)"),
        ("a\0b.png", "no file can have"),
        ("\ud800.png", "no file can have"),
        (os.fsdecode(b"\xff.png"), "no file can have"),
        ("x" * 5000, "File name too long"),
        ("loop.png", "cannot be read: Too many"),
        ("https://example.com/a.png", "not fetched"),
        ("HTTP://example.com/a.png", "not fetched"),
        ("s3://bucket/a.png", "not fetched"),
        ({"image_url": {"url": "https://example.com/a.png"}}, "not fetched"),
        ("data:image/png;base64,a?b", "base64 is broken"),
        ("data:image/png;base64,", r"is empty \(0 bytes\)"),
        ("data:video/mp4;base64,AAAA", "video/mp4"),
        (b"", r"is empty \(0 bytes\)"),
        ({"bytes": b"", "path": "p.png"}, r"is empty \(0 bytes\)"),
        ({"bytes": [1, 2]}, "'bytes' are of type list"),
        ({"path": None, "bytes": None}, "neither a path nor bytes"),
        ({}, "neither a path nor bytes"),
        (None, "null"),
        (3, "of type int"),
        (True, "of type bool"),
        (["p.png"], "of type list"),
    ],
)
def test_what_is_no_image_is_refused_with_its_row(tmp_path: Path, image: str, given: object, words: str) -> None:
    (tmp_path / "zero.png").touch()
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"GIF")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(UserError, match=words) as caught:
        locate(given, tmp_path, ORIGIN)
    assert ORIGIN in caught.value.where and len(str(caught.value)) < 600 and str(caught.value).encode()


def test_a_file_that_may_not_be_read_is_refused_with_its_row(write_json: Write, tmp_path: Path, image: str) -> None:
    (tmp_path / image).chmod(0)
    if os.access(tmp_path / image, os.R_OK):
        pytest.skip("this user may read everything")
    source = write_json("a.json", [{"image": image, "conversations": [HUMAN, GPT]}])
    with pytest.raises(UserError, match=r"ermission denied(.|\n)*p\.png .named by .*row 0"):
        load_conversations(str(source))


def test_a_data_uri_in_a_row_is_loaded_and_a_broken_one_names_its_row(write_json: Write, content: bytes) -> None:
    text = base64.b64encode(content).decode()
    rows = [{"image": f"data:image/png;base64,{text}", "conversations": [HUMAN, GPT]}]
    [row] = load_conversations(str(write_json("a.json", rows)))
    assert is_the_image(row["images"][0])
    rows.append({"image": f"data:image/png;base64,{'AAAA' * 30}", "conversations": [HUMAN, GPT]})
    with pytest.raises(UserError, match=r"no known format(.|\n)*b\.json, line 1, row 1"):
        load_conversations(str(write_json("b.json", rows)))
