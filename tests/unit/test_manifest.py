"""A sealed folder tells what has changed since, and one that was promised only that it was never finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmixlora.errors import UserError
from qmixlora.manifest import MANIFEST, check_unchanged, first_change, promise, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deeper").mkdir()
    for name, content in {
        "a.bin": b"abcd",
        "deeper/b.bin": b"efgh",
        "training_args.bin": b"x",
        ".DS_Store": b"y",
    }.items():
        (tmp_path / name).write_bytes(content)
    seal(tmp_path)
    return tmp_path


def test_what_is_sealed_has_not_changed(folder: Path) -> None:
    assert first_change(folder) is None
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {"a.bin", "deeper/b.bin"}


def test_a_folder_without_a_manifest_has_nothing_to_compare(tmp_path: Path) -> None:
    assert first_change(tmp_path, ["a.bin"]) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"abcx", "a.bin has another content"), (b"abc", "a.bin has 3 bytes, and had 4"), (None, "a.bin is missing")],
)
def test_a_change_is_named(folder: Path, content: bytes | None, words: str) -> None:
    (folder / "a.bin").unlink() if content is None else (folder / "a.bin").write_bytes(content)
    assert words in (first_change(folder) or "")
    assert first_change(folder, ["deeper/b.bin", "not listed"]) is None
    with pytest.raises(UserError, match=f"The file is not as it was written: {words}"):
        check_unchanged(folder, ["a.bin"], "The file")


def test_files_that_nobody_reads_and_new_ones_are_no_change(folder: Path) -> None:
    (folder / "training_args.bin").unlink()
    (folder / "evaluation.json").touch()
    assert first_change(folder) is None


def test_a_promised_folder_was_never_finished(folder: Path) -> None:
    promise(folder)
    assert first_change(folder) == "it was never finished"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "files": [1]}', '{"files": {}}'])
def test_a_broken_manifest_vouches_for_nothing(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert first_change(folder) == "manifest.json is broken"


def test_a_later_manifest_is_refused_by_its_version(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"version": 2, "files": {}}))
    with pytest.raises(UserError, match="its format is 2, and this release knows 1"):
        first_change(folder)
