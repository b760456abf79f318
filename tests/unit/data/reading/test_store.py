"""A large source is read once: what was made of it is kept, as long as it is what it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.data.reading import loading, store
from qmixlora.data.reading.loading import Loaded, load
from qmixlora.data.reading.rows import Reading
from qmixlora.errors import UserError

from ..helpers import GPT, HUMAN


@pytest.fixture
def source(tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two rows about an image, which counts as large."""
    monkeypatch.setattr(store, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "a.json", [asked(image), asked(image)])


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every row that is read from a source from now on."""
    rows: list[int] = []
    original = loading._sample

    def counted(*arguments: Any) -> Any:
        rows.append(1)
        return original(*arguments)

    monkeypatch.setattr(loading, "_sample", counted)
    return rows


def asked(image: str, answer: str = "seven") -> dict[str, Any]:
    return {"image": image, "conversations": [HUMAN, {"from": "gpt", "value": answer}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def start(source: Path, policy: Any = "stop", **reading: Any) -> Loaded:
    loaded = load(str(source), "train", None, Reading(**reading))
    loaded.usable(str(source), policy)
    return loaded


def test_the_second_start_reads_what_the_first_has_kept(source: Path, read_anew: list[int]) -> None:
    first, second = start(source), start(source)
    assert len(read_anew) == 2 and list(first.rows) == list(second.rows)


def test_what_is_kept_is_mapped_and_not_held(source: Path, tmp_path: Path) -> None:
    [file] = start(source).rows.cache_files
    assert Path(file["filename"]).is_relative_to(tmp_path / "cache")


def test_it_is_what_a_small_source_gives(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = start(source).rows
    monkeypatch.setattr(store, "SMALL", 1 << 20)
    small = start(source).rows
    assert list(kept) == list(small) and kept.features == small.features and not small.cache_files


def test_a_source_that_has_changed_is_read_anew_and_its_old_state_removed(
    source: Path, image: str, tmp_path: Path, read_anew: list[int]
) -> None:
    start(source)
    write(source, [asked(image, "other")])
    assert start(source).rows[0]["turns"][1]["text"] == "other" and len(read_anew) == 3
    assert len(list((tmp_path / "cache").rglob("rows.arrow"))) == 1


def test_the_same_size_at_another_time_is_another_state(source: Path, read_anew: list[int]) -> None:
    start(source)
    os.utime(source, (1, 1))
    start(source)
    assert len(read_anew) == 4


def test_another_way_to_read_the_same_source_is_kept_beside_it(source: Path, read_anew: list[int]) -> None:
    for _ in range(2):
        assert start(source).rows["task"][0] == "all"
        assert start(source, task_field="image").rows["task"][0] == "p.png"
    assert len(read_anew) == 4


def test_a_picture_that_is_gone_is_missed_at_the_second_start(source: Path, tmp_path: Path, image: str) -> None:
    start(source)
    (tmp_path / image).unlink()
    with pytest.raises(UserError, match="2 samples") as caught:
        start(source)
    assert "An image is missing" in caught.value.what


@pytest.mark.parametrize("link", ["folder", "file"])
def test_a_link_that_leads_to_another_picture_is_followed_anew(
    source: Path, tmp_path: Path, image: str, link: str, read_anew: list[int]
) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        shutil.copy2(tmp_path / image, tmp_path / version / "a.png")  # the same size and time
    named, targets = ("set", ("one", "two")) if link == "folder" else ("a.png", ("one/a.png", "two/a.png"))
    write(source, [asked("set/a.png" if link == "folder" else "a.png")])
    for target in targets:
        (tmp_path / named).unlink(missing_ok=True)
        (tmp_path / named).symlink_to(target)
        for _ in range(2):
            [row] = start(source).rows
            assert row["images"][0]["path"] == str((tmp_path / target / ("a.png" * (link == "folder"))).resolve())
    assert len(read_anew) == 2


def test_a_picture_that_was_missing_is_found_at_the_second_start(source: Path, tmp_path: Path) -> None:
    write(source, [asked("p.png"), asked("late.png")])
    assert len(start(source, "skip").rows) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "late.png")
    assert len(start(source, "skip").rows) == 2


def test_refusals_are_kept_with_the_rows(source: Path, image: str, read_anew: list[int]) -> None:
    write(source, [asked(image), {"conversations": [GPT]}])
    first, second = start(source, "skip"), start(source, "skip")
    assert first.refused == second.refused and second.refused.count == 1 and len(read_anew) == 2
    with pytest.raises(UserError, match="no turn of the user"):
        start(source, "stop")


def test_what_is_broken_in_the_cache_is_made_anew(source: Path, tmp_path: Path) -> None:
    start(source)
    for name in (store.TABLE, store.ABOUT):
        [file] = (tmp_path / "cache").rglob(name)
        file.write_bytes(file.read_bytes()[:10])
        assert len(start(source).rows) == 2


def test_a_start_that_fails_keeps_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text()[:-5])
    with pytest.raises(UserError, match="Broken JSON"):
        start(source)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_pictures_inside_a_source_are_written_in_batches(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BYTES", 100)
    rows: list[Any] = [{"turns": [], "images": [{"path": None, "bytes": b"x" * 60}], "task": "t"}] * 5
    assert [len(batch) for batch in store.in_batches(rows, store._image_bytes, 4)] == [2, 2, 1]
    assert store.in_memory(rows)["images"][4][0]["bytes"] == b"x" * 60
