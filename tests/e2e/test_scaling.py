"""The commands of docs/scaling.md, as they stand there, and processes that a signal or a kill ends, all real."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine

from .test_signals import LONG, ended, last_step, started, wait_until

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
LINES = [
    line.partition("#")[0].strip()
    for line in re.findall(r"^    (\S.*)$|`(torchrun [^`]*)`", PAGE.replace("\\\n", ""), re.MULTILINE)
    for line in line
    if line.startswith(("qmixlora", "accelerate launch", "torchrun"))
]
SPEC = {"max_steps": 2, "micro_batch_size": 2, "save_every": None}
WEIGHTS = "adapter/adapter_model.safetensors"


def test_the_page_has_every_way_to_start() -> None:
    assert len(LINES) == 5 and sum("--machine_rank" in line for line in LINES) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def learned_by_one(
    qmixlora: CommandLine, make_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What one process learns from the batches that two have together."""
    folder = tmp_path_factory.mktemp("one")
    recipe = make_recipe_in(folder, train={**SPEC, "gradient_accumulation": 2})
    (folder / "one.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert qmixlora("train", folder / "one.yaml").code == 0
    return load_file(folder / "run" / WEIGHTS)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(" -m")[0])
def test_a_command_of_the_page_learns_what_one_process_learns(
    learned_by_one: dict[str, torch.Tensor], make_recipe: Callable[..., Recipe], tmp_path: Path, line: str
) -> None:
    file = tmp_path / "several.yaml"
    file.write_text(make_recipe(train=SPEC).to_yaml(), encoding="utf-8")
    words = line.replace("my.yaml", str(file)).replace("HOST", "127.0.0.1")
    words = words.replace("--num_processes 16", "--num_processes 2").replace("29500", str(free_port()))
    scripts = {
        "qmixlora": [sys.executable, "-m", "qmixlora.cli.main"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())],
    }
    script, *arguments = shlex.split(words)
    ranks = ("0", "1") if "--machine_rank" in words else ("0",)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    machines = []
    for rank in ranks:  # of a second machine, on this one
        own = [rank if before == "--machine_rank" else word for before, word in zip(["", *arguments], arguments)]  # noqa: B905
        machines.append(subprocess.Popen([*scripts[script], *own], env=environment))
    assert [machine.wait(LONG) for machine in machines] == [0] * len(machines)
    own = load_file(tmp_path / "run" / WEIGHTS)
    for name, tensor in learned_by_one.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes_after_a_step_that_is_kept(
    recipe_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    with started("train", recipe_file, "train.max_steps=100000", "train.save_every=null", "--processes", 2) as process:
        wait_until(lambda: last_step(run) >= 2, process)
        process.send_signal(number)
        _, err = ended(process, code)
    assert err.count("qmixlora:") == 1 and f"qmixlora train {run} --resume" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"checkpoint-{last_step(run)}"]
    assert not list(run.glob(".*"))


def test_an_error_is_told_once_and_leaves_nothing(recipe_file: Path, tmp_path: Path) -> None:
    with started("train", recipe_file, "data.train=missing.json", "--processes", 2) as process:
        _, err = ended(process, 2)
    assert err.count("qmixlora:") == 1 and "missing.json" in err and not (tmp_path / "run").exists()
