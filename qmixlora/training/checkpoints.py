"""The checkpoints of a run: each sealed with a manifest when it is whole, and the newest whole one to go on from."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from qmixlora import processes
from qmixlora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qmixlora.manifest import first_change, has_manifest, seal
from qmixlora.mixlora import PEFT_TYPE
from qmixlora.mixlora.routing_record import FILE, SUMS

STATE = "trainer_state.json"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
PREFIX = "checkpoint-"


def checkpoint_at(folder: str | Path, step: int) -> Path:
    """Where Trainer puts the checkpoint of a step, in the folder of a run's checkpoints."""
    return Path(folder) / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of, by its folder's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


class SealedCheckpoints(TrainerCallback):
    """Seals a checkpoint when every other callback has put its files into it, and then removes the oldest.

    Trainer itself would remove the older one before the new one is whole. It has to be the last of the callbacks that
    save something.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.wait_for_all()  # each writes its own random state
        if state.is_world_process_zero:
            seal(checkpoint_at(args.output_dir, state.global_step))
            remove_old_checkpoints(Path(args.output_dir), self.keep, state.global_step, state.best_global_step)
        processes.wait_for_all()  # a launcher that sees one end would end the main one


def keep_all(callbacks: Iterable[TrainerCallback]) -> None:
    """Have the callback among them that seals checkpoints remove none from now on."""
    for callback in callbacks:
        if isinstance(callback, SealedCheckpoints):
            callback.keep = sys.maxsize


def remove_old_checkpoints(folder: Path, keep: int, step: int, best: int | None = None) -> None:
    """Remove the checkpoints up to a step but the newest `keep`, among which none counts that was never finished, and
    the best one.
    """
    up_to = [path for path in _newest_first(folder) if step_of(path) <= step]
    finished = [path for path in up_to if (path / STATE).is_file()]
    for path in up_to:
        if path not in finished[:keep] and step_of(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; newer ones that are not are named on stderr, and left as they are.

    Raises:
        UserError: a checkpoint is of a later release.
    """
    for path in _newest_first(run / "checkpoints"):
        problem = damage(path)
        if problem is None:
            return path
        print(f"{path} is left out: {problem}.", file=sys.stderr)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, to complete "it is left out: ..."; None if it is whole.

    Raises:
        UserError: it is of a later release.
    """
    if not (checkpoint / STATE).is_file() and not has_manifest(checkpoint):
        return "it was never finished"
    return first_change(checkpoint) if has_manifest(checkpoint) else _unreadable(checkpoint)


def _newest_first(checkpoints: Path) -> list[Path]:
    numbered = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(filter(Path.is_dir, numbered), key=step_of, reverse=True)


def _unreadable(checkpoint: Path) -> str | None:
    """What is missing in a checkpoint without a manifest, as earlier releases wrote it, or cannot be read."""
    needed = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER, SCHEDULER, STATE]
    for path in (checkpoint / name for name in needed):
        if not path.is_file():
            return f"{path.name} is missing"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for path in sorted(checkpoint.iterdir()):
        try:
            READERS.get(path.suffix, lambda path: None)(path)
        except Exception as error:  # torch, zipfile, safetensors and json have errors of their own
            return f"{path.name} cannot be read ({type(error).__name__})"
    config, state = (json.loads((checkpoint / name).read_text(encoding="utf-8")) for name in (ADAPTER_CONFIG, STATE))
    if config.get("peft_type") == PEFT_TYPE:
        missing = next((name for name in (FILE, SUMS) if not (checkpoint / name).is_file()), None)
        if missing:
            return f"{missing} is missing"
    if state.get("global_step") != step_of(checkpoint):
        return f"{STATE} is of step {state.get('global_step')}"
    return None


def _read_pickled(path: Path) -> None:
    """Read a file of torch.save, by its checksums and without running anything that it holds."""
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(broken)
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_tensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            file.get_slice(name)


def _read_object(path: Path) -> None:
    if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
        raise TypeError(path.name)


READERS: dict[str, Callable[[Path], None]] = {
    ".pt": _read_pickled,
    ".pth": _read_pickled,
    ".safetensors": _read_tensors,
    ".json": _read_object,
}
