"""Real signals to the real command: a clean end, the exit code of the signal, and a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmixlora.files import read_log
from tests.conftest import CommandLine

LONG = 300  # seconds after which something is wrong, at any load


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-c", "from qmixlora.cli.main import run; run()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(LONG * 20):
        if holds():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err and "Traceback" not in out
    return out, err


def last_step(run: Path) -> int:
    return max([record["step"] for record in read_log(run / "metrics.jsonl")], default=0)


ENDS = [
    (signal.SIGINT, 130),
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_ends_training_after_a_step_that_is_kept(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    with started("train", recipe_file, "train.max_steps=100000", "train.save_every=null") as process:
        wait_until(lambda: last_step(run) >= 2, process)
        process.send_signal(number)
        _, err = ended(process, code)
    assert "stopping after this step" in err and f"qmixlora train {run} --resume" in err
    step = last_step(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    assert not list(run.glob(".*"))
    again = qmixlora("train", run, "--resume", f"train.max_steps={step + 1}")
    assert again.code == 0 and f"{step + 1}/{step + 1}" in again.stdout, again.stderr


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether the process has come to where it handles SIGTERM (before, nothing of ours runs)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks at processes through /proc")
@pytest.mark.parametrize("verb", ["eval", pytest.param("plan", marks=pytest.mark.long)])
def test_a_signal_ends_other_verbs_without_a_traceback(recipe_file: Path, copied_run: Path, verb: str) -> None:
    with started(verb, copied_run if verb == "eval" else recipe_file) as process:
        wait_until(lambda: handles_signals(process), process)
        process.send_signal(signal.SIGTERM)
        _, err = ended(process, 143)
    assert err.startswith("qmixlora: Stopped by SIGTERM")
    assert not list(copied_run.glob(".*"))


def test_ctrl_c_while_the_command_is_imported_ends_it_quietly() -> None:
    script = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'qmixlora.cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from qmixlora.cli import run\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.long
def test_a_signal_in_an_export_leaves_whole_exports_only(copied_run: Path) -> None:
    with started("export", copied_run, "--all", "--as", "merged", "--polish", "0") as process:
        wait_until(lambda: any((copied_run / "exports").glob(".scratch.*")), process)
        process.send_signal(signal.SIGINT)
        ended(process, 130)
    assert not list((copied_run / "exports").glob(".*"))


@pytest.mark.long
def test_a_signal_while_features_are_computed_leaves_whole_files(recipe_file: Path, tmp_path: Path) -> None:
    spec = ("train.cache_features=true", "adapter.projector=frozen", "train.eval_batch_size=1")
    folder = tmp_path / "run" / "features"
    with started("train", recipe_file, *spec, "train.max_steps=100000") as process:
        wait_until(lambda: any(folder.glob("*.safetensors")), process)
        process.send_signal(signal.SIGTERM)
        ended(process, 143)
    assert not list(folder.glob(".*"))
