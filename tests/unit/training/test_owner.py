"""A run's folder has one owner, whose lock dies with its process; what cannot be written is one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmixlora.errors import UserError
from qmixlora.files import replacing
from qmixlora.recipe import Recipe
from qmixlora.training import train
from qmixlora.training.owner import LOCK, is_empty, owned
from tests.disks import mounted

from .helpers import QUIET

HOLD = (
    "import sys, time; from pathlib import Path; from qmixlora.training.owner import owned\n"
    "with owned(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the folder `run`."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.long
def test_a_second_start_says_who_holds_the_folder(
    make_recipe: Callable[..., Recipe], holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    since = json.loads((tmp_path / "run" / LOCK).read_text())["since"]
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*, since {since}"):
        train(make_recipe(), console=QUIET)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_lock_dies_with_its_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file() and is_empty(tmp_path / "run")
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    with owned(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    with owned(tmp_path / "run"):
        os.write(write, b"x")
    os.waitpid(child, 0)


def test_a_folder_that_nothing_came_into_is_gone_afterwards(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_what_file_managers_leave_is_no_content(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").touch()
    train(make_recipe(train={"max_steps": 1}), console=QUIET)
    assert not is_empty(tmp_path / "run")


def test_a_file_in_the_folders_place_is_one_message(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(UserError, match=r"cannot be written: File exists[\s\S]*train.output"):
        train(make_recipe(), console=QUIET)
    assert (tmp_path / "run").read_text() == "precious"
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        train(make_recipe(train={"output": str(tmp_path / "run" / "inside")}), console=QUIET)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be written, with an empty folder."""
    with mounted(tmp_path / "disk", "ro") as disk:
        yield disk


def test_a_read_only_folder_is_one_message(make_recipe: Callable[..., Recipe], read_only: Path) -> None:
    for folder in (read_only, read_only / "run"):
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            train(make_recipe(train={"output": str(folder)}), console=QUIET)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """File systems of so many KiB."""
    with ExitStack() as disks:
        yield lambda kib: disks.enter_context(mounted(tmp_path / f"disk-{kib}", f"size={kib}k"))


SIZES = [4, 64, 300, pytest.param(0, marks=pytest.mark.exhaustive)]  # KiB; 0: many


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_is_full_at_any_moment_is_one_message(
    make_recipe: Callable[..., Recipe], small_disk: Callable[[int], Path], size: int
) -> None:
    """Every size until a run fits, from that of its first file on: whichever file does not fit, `optimizer.pt` too."""
    messages = set()
    for kib in [size] if size else range(4, 4000, 60):
        folder = small_disk(kib) / "run"
        try:
            train(make_recipe(train={"output": str(folder), "max_steps": 2, "save_every": 1}), console=QUIET)
            assert size == 0
            break
        except UserError as error:
            messages.add(error.what)
            assert not (folder / "adapter").exists()
    assert messages == {"The disk is full."}


def test_a_file_that_does_not_fit_is_not_there(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(4)
    with pytest.raises(OSError, match="No space left"), replacing(disk / "file") as temporary:
        temporary.write_bytes(b"x" * 100_000)
    assert list(disk.iterdir()) == []
