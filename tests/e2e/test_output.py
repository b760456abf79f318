"""What is printed can no longer be written: work goes on, and listings end quietly or in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_signals import LONG, last_step, wait_until

COMMAND = [sys.executable, "-c", "from qmixlora.cli.main import run; run()"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def started(*arguments: object, stdout: int, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=stdout, stderr=stderr, text=True, env=environment)


def told_on_full_disk(*arguments: object, code: int) -> str:
    """What a command says on standard error where its output goes to a full disk."""
    full = os.open(FULL, os.O_WRONLY)
    process = started(*arguments, stdout=full)
    os.close(full)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == code, err
    return err


@pytest.mark.parametrize("arguments", [(), ("recipes", "list"), ("recipes", "schema"), ("doctor", "--help")])
def test_a_listing_that_nobody_reads_ends_quietly_as_programs_do(unread: int, arguments: tuple[str, ...]) -> None:
    process = started(*arguments, stdout=unread)
    assert process.communicate(timeout=LONG)[1] == "" and process.returncode == 128 + signal.SIGPIPE


@needs_full
@pytest.mark.parametrize("arguments", [(), ("recipes", "list"), ("recipes", "schema")])
def test_a_listing_that_cannot_be_written_ends_in_one_line(arguments: tuple[str, ...]) -> None:
    told = told_on_full_disk(*arguments, code=74)
    assert told == "qmixlora: What is printed cannot be written: No space left on device.\n"


@pytest.mark.long
def test_a_run_that_nobody_watches_any_more_goes_on(unread: int, recipe_file: Path, tmp_path: Path) -> None:
    process = started("train", recipe_file, stdout=unread)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 0 and err.count("What is printed is lost from here on") == 1, err
    assert (tmp_path / "run" / "adapter").is_dir()


@needs_full
@pytest.mark.long
def test_a_run_goes_on_when_its_log_is_on_a_full_disk(recipe_file: Path, tmp_path: Path) -> None:
    told = told_on_full_disk("train", recipe_file, code=74)
    assert told.count("No space left on device") == 1 and (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.long
def test_ctrl_c_keeps_the_step_of_a_run_whose_reader_it_ends_too(
    unread: int, recipe_file: Path, tmp_path: Path
) -> None:
    """As in `qmixlora train ... 2>&1 | tee log`."""
    run = tmp_path / "run"
    process = started(
        "train", recipe_file, "train.max_steps=100000", "train.save_every=null", stdout=unread, stderr=unread
    )
    wait_until(lambda: last_step(run) >= 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LONG) == 130
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"checkpoint-{last_step(run)}"]
