"""Files and folders that are whole or not there, and logs that a crash may have cut short."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qmixlora import files
from qmixlora.errors import UserError
from qmixlora.files import (
    check_can_be_written,
    clear_disk_errors,
    replacing,
    scratch_folder,
    unusable,
    write_json,
)
from tests.disks import mounted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "file").write_text(text)


@pytest.fixture
def of_the_dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def of_the_living() -> int:
    return os.getppid()


def test_a_file_is_not_there_until_it_is_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "a").exists()
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole" and names(tmp_path) == ["a"]


def test_until_then_the_one_before_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("after")
        assert (tmp_path / "a").read_text() == "before"
    assert (tmp_path / "a").read_text() == "after"


def test_a_folder_replaces_the_one_before_as_a_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", "before")
    (tmp_path / "a" / "another").touch()
    with replacing(tmp_path / "a") as temporary:
        make_folder(temporary, "after")
    assert names(tmp_path / "a") == ["file"] and (tmp_path / "a" / "file").read_text() == "after"
    assert names(tmp_path) == ["a"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", "before")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("a", "b"):
        with pytest.raises(UserError, match="a folder where a file"), replacing(tmp_path / name) as temporary:
            temporary.write_text("after")
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "b" / "file").read_text() == "before"


def test_a_folder_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(UserError, match="a file where a folder"), replacing(tmp_path / "a") as temporary:
        make_folder(temporary, "after")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_the_folder_around_it_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "er" / "a") as temporary:
        temporary.touch()
    assert (tmp_path / "deep" / "er" / "a").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_and_the_one_before(tmp_path: Path, error: type[BaseException]) -> None:
    make_folder(tmp_path / "a", "before")
    with pytest.raises(error), replacing(tmp_path / "a") as temporary:
        make_folder(temporary, "after")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "before"


def test_leftovers_of_dead_processes_go(tmp_path: Path, of_the_dead: int) -> None:
    (tmp_path / f".a.{of_the_dead}.tmp").touch()
    with replacing(tmp_path / "a") as temporary:
        temporary.touch()
    assert names(tmp_path) == ["a"]


def test_what_a_process_before_us_with_our_number_left_goes_too(tmp_path: Path) -> None:
    make_folder(tmp_path / f".a.{os.getpid()}.tmp", "before us")
    with replacing(tmp_path / "a") as temporary:
        assert not temporary.exists()
        temporary.touch()
    assert (tmp_path / "a").is_file()


def test_files_of_living_processes_and_of_other_names_stay(
    tmp_path: Path, of_the_living: int, of_the_dead: int
) -> None:
    others = [f".a.{of_the_living}.tmp", f".b.{of_the_dead}.tmp", ".a.mine.tmp"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "a") as temporary:
        temporary.touch()
    assert names(tmp_path) == sorted([*others, "a"])


def test_a_scratch_folder_is_of_one_process_and_goes_with_its_block(
    tmp_path: Path, of_the_dead: int, of_the_living: int
) -> None:
    for process in (of_the_dead, of_the_living):
        make_folder(tmp_path / f".scratch.{process}.tmp", "theirs")
    with pytest.raises(ValueError), scratch_folder(tmp_path) as scratch:
        make_folder(scratch, "ours")
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == [f".scratch.{of_the_living}.tmp"]


def test_a_folder_that_another_process_made_meanwhile_stays_if_asked_for(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", unless_there=True) as temporary:
        make_folder(temporary, "ours")
        make_folder(tmp_path / "a", "theirs")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "theirs"


REPLACED = """
import sys
from pathlib import Path
from qmixlora.files import replacing
for round in range(300):
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("whole")
"""


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="elsewhere two names cannot change places at once")
def test_a_folder_is_there_at_every_moment_while_it_is_replaced(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", "whole")
    process = subprocess.Popen([sys.executable, "-c", REPLACED, str(tmp_path / "a")])
    times_missing = 0
    while process.poll() is None:
        times_missing += not (tmp_path / "a").is_dir()
    assert process.returncode == 0 and times_missing == 0 and names(tmp_path) == ["a"]


def test_a_folder_is_replaced_where_two_names_cannot_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    make_folder(tmp_path / "a", "before")
    with replacing(tmp_path / "a") as temporary:
        make_folder(temporary, "after")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "after"


def test_a_folder_that_a_dead_process_moved_away_goes_back(tmp_path: Path, of_the_dead: int) -> None:
    make_folder(tmp_path / f".a.{of_the_dead}.old", "before")
    make_folder(tmp_path / f".a.b.{of_the_dead}.old", "another one's")
    with pytest.raises(ValueError), replacing(tmp_path / "a"):
        raise ValueError
    assert names(tmp_path) == [f".a.b.{of_the_dead}.old", "a"]
    assert (tmp_path / "a" / "file").read_text() == "before"


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert names(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"x": 2}


def test_json_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 151552 vs 151440"),
        RuntimeError("basic_ios::clear: iostream error"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["the system", "a quota", "torch", "torch at the end", "C++", "safetensors"],
)
def test_a_full_disk_is_one_clear_message(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="The disk is full") as raised, clear_disk_errors(tmp_path, "Free some space."):
        raise error
    assert str(tmp_path) in str(raised.value) and "Free some space." in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("shapes"), KeyError("x")])
def test_other_errors_pass_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, clear_disk_errors(tmp_path, "Free some space."):
        raise error
    assert raised.value is error


def test_what_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_can_be_written(tmp_path)
    check_can_be_written(tmp_path / "none" / "such")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(NotADirectoryError, match=re.escape(str(tmp_path / "file"))):
            check_can_be_written(path)
    assert names(tmp_path) == ["file"]


def test_a_folder_on_a_read_only_disk_cannot_be_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(PermissionError):
        check_can_be_written(disk / "none")


def test_what_the_system_refuses_is_one_message_with_the_name_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as raised, replacing(tmp_path / "a") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
    told = unusable(raised.value)
    assert told is not None and "Permission denied" in told.what and told.where == str(tmp_path / "a")


def test_a_full_disk_is_told_of_the_file_that_was_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as raised, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    told = unusable(raised.value)
    assert told is not None and "No space left" in told.what and told.where == str(tmp_path / "a")


def test_a_name_that_no_file_system_takes_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long") as raised:
        (tmp_path / ("x" * 5000)).stat()
    told = unusable(raised.value)
    assert told is not None and "too long" in told.what


def test_of_the_cache_everything_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    for path in (tmp_path / "none", tmp_path / "none" / "qmixlora" / "file"):
        told = unusable(FileNotFoundError(errno.ENOENT, "No such file or directory", str(path)))
        assert told is not None and "XDG_CACHE_HOME" in told.fix


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "none", "/nowhere"), OSError("words"), OSError(errno.EACCES, "no name")]
)
def test_mistakes_of_ours_are_not_told_as_the_users(error: OSError) -> None:
    assert unusable(error) is None
