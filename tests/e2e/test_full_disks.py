"""Soak: a disk of every size, from nothing to enough, for the saves of a run and for its exports."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qmixlora.manifest import MANIFEST, first_change
from qmixlora.training.checkpoints import damage
from tests.conftest import CommandLine

STEPS = 20  # of sizes
WEIGHTS = "adapter/adapter_model.safetensors"


class Disk:
    """A file system in memory, at `folder`, that can be made larger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, size: int) -> bool:
        return self._done("mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(self.folder))

    def resize(self, size: int) -> None:
        assert self._done("mount", "-o", f"remount,size={size}", str(self.folder))

    def unmount(self) -> None:
        self._done("umount", "-l", str(self.folder))

    def _done(self, *command: str) -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    if not disk.mount(1 << 20):
        pytest.skip("needs the right to mount a file system")
    disk.unmount()
    yield disk
    disk.unmount()


def size_of(folder: Path) -> int:
    """The bytes that a folder takes in whole pages of 4 KiB, its own entries included."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def sizes(enough: int) -> list[int]:
    return [enough * step // (STEPS - 1) for step in range(STEPS)]


def nothing_looks_finished(run: Path) -> bool:
    """What is there under a final name is whole."""
    adapter = not (run / "adapter").exists() or bool(load_file(run / WEIGHTS))
    exports = [path for path in (run / "exports").glob("*") if not path.name.startswith(".")]
    return adapter and all((path / MANIFEST).is_file() and first_change(path) is None for path in exports)


@pytest.mark.exhaustive
def test_a_run_ends_in_one_message_on_any_disk_and_goes_on_with_more(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, disk: Disk
) -> None:
    saving = ("train.save_every=1", "train.keep_checkpoints=2")
    assert qmixlora("train", recipe_file, *saving).code == 0
    expected, enough = load_file(tmp_path / "run" / WEIGHTS), 2 * size_of(tmp_path / "run")
    codes = []
    for size in sizes(enough):
        assert disk.mount(size)
        run = disk.folder / "run"
        done = qmixlora("train", recipe_file, *saving, f"train.output={run}")
        codes.append(done.code)
        assert done.code == 0 or (done.code == 2 and "disk is full" in done.stderr), done.stderr
        assert nothing_looks_finished(run)
        whole = [path for path in (run / "checkpoints").glob("checkpoint-*") if damage(path) is None]
        disk.resize(2 * enough)
        if done.code and whole:
            again = qmixlora("train", recipe_file, *saving, f"train.output={run}", "--resume")
            assert again.code == 0, again.stderr
        if done.code == 0 or whole:
            weights = load_file(run / WEIGHTS)
            assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        disk.unmount()
    assert codes[0] == 2 and codes[-1] == 0 and len(set(codes)) == 2


@pytest.mark.exhaustive
def test_an_export_leaves_the_one_before_or_is_whole_on_any_disk(
    qmixlora: CommandLine, finished_run: Callable[[str], Path], tmp_path: Path, disk: Disk
) -> None:
    run = Path(shutil.copytree(finished_run("mixlora"), tmp_path / "whole"))
    shutil.rmtree(run / "exports", ignore_errors=True)
    command = ("--task", "digit", "--polish", 0, "--samples", 1, "--as", "lora", "--as", "merged")
    assert qmixlora("export", run, *command).code == 0
    there, codes = size_of(run), []
    for size in sizes(2 * size_of(run / "exports")):
        assert disk.mount(there + size)
        own = Path(shutil.copytree(run, disk.folder / "run"))
        done = qmixlora("export", own, *command)
        codes.append(done.code)
        assert done.code == 0 or (done.code == 2 and "disk is full" in done.stderr), done.stderr
        names = sorted(path.name for path in (own / "exports").iterdir() if not path.name.startswith("."))
        assert names == ["base", "digit-lora", "digit-merged"] and nothing_looks_finished(own)
        disk.unmount()
    assert codes[0] == 2 and codes[-1] == 0
