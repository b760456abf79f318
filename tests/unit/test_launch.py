"""Several processes of one command: how they end, and what signals do to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmixlora.launch import launch

WAITING = "import time; time.sleep(600)"


def command(script: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys; rank = int(os.environ['LOCAL_RANK']); {script}"]


def test_every_process_knows_its_number_and_the_others(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    script = f"open(f'{tmp_path}/' + ' '.join(os.environ[n] for n in {names}), 'w')"
    assert launch(2, command(script)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_one_that_fails_ends_the_others_and_gives_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmixlora.launch.GRACE", 0.0)
    assert launch(3, command(f"sys.exit(2) if rank == 1 else None; {WAITING}")) == 2


def test_one_that_is_killed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qmixlora.launch.GRACE", 0.0)
    code = launch(2, command(f"os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None; {WAITING}"))
    assert code == 137 and "Process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err


def test_a_signal_reaches_all_of_them_once(tmp_path: Path) -> None:
    count = f"open('{tmp_path}/' + str(rank), 'a').write('x'), sys.exit(143)"
    script = f"signal.signal(signal.SIGTERM, lambda *_: ({count})); os.write(1, b'ready\\n'); {WAITING}"
    line = f"import sys; from qmixlora.launch import launch; sys.exit(launch(2, {command(script)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "x", "1": "x"}
