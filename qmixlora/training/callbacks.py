"""Callbacks of a run: metrics.jsonl, routing.safetensors, and the progress display."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from qmixlora.device import peak_memory_gib, reset_peak_memory
from qmixlora.files import append_to_log, read_log, replacing
from qmixlora.mixlora.routing_record import FILE, RoutingRecord, RoutingStatistics

from .checkpoints import checkpoint_at


class MetricsLog(TrainerCallback):
    """Writes `metrics.jsonl`: one object per log, with `step`, Trainer's own numbers, `samples` and `padding`
    (a share of all tokens) since the log before, `start` (the step that the run went on from), `seconds` since then,
    and `memory_gib`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.start, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first_step = time.monotonic(), state.global_step
        reset_peak_memory()
        if state.is_world_process_zero and self.path.exists():  # a resumed run repeats the steps after its checkpoint
            records = read_log(self.path)
            with replacing(self.path) as temporary:
                temporary.touch()
                for record in records:
                    if isinstance(step := record.get("step"), int) and step <= state.global_step:
                        append_to_log(temporary, record)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, **(logs or {}), "start": self.first_step}
        seconds = time.monotonic() - self.start
        append_to_log(self.path, {**record, "seconds": seconds, "memory_gib": peak_memory_gib()})


class RoutingLog(TrainerCallback):
    """Writes `routing.safetensors`: how every task was routed in each tenth of the run, all its samples counted.

    A best step, and the last, in the first tenth have a snapshot of their own: each may be what the run keeps.
    What is counted so far lies in every checkpoint, so that a resumed run counts no sample twice and forgets none.
    """

    def __init__(self, model: PeftModel, tasks: Sequence[str], folder: Path) -> None:
        self.statistics = RoutingStatistics(model, tasks)
        self.record, self.folder = RoutingRecord(tasks), folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            checkpoint = checkpoint_at(args.output_dir, state.global_step)
            self.record.load(checkpoint)
            self.statistics.load(checkpoint)
        self.watching = self.statistics.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            self._take_snapshot(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.best_global_step and not self.record.steps:
            self._take_snapshot(state)
        checkpoint = checkpoint_at(args.output_dir, state.global_step)
        self.statistics.save(checkpoint)
        if state.is_world_process_zero:
            self._save(checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.remove()
        if not self.record.steps:
            self._take_snapshot(state)

    def logs(self) -> dict[str, float]:
        """What trackers are told: the mean entropy of factor usage, from the first snapshot on."""
        return {"routing_entropy": self.record.entropy()} if self.record.steps else {}

    def _take_snapshot(self, state: Any) -> None:
        self.record.add(state.global_step, *self.statistics.take())  # in all processes: all know what there is
        if state.is_world_process_zero:
            self._save(self.folder)

    def _save(self, folder: Path) -> None:
        with replacing(folder / FILE) as temporary:
            self.record.save(temporary)


class ProgressDisplay(TrainerCallback):
    """Shows step, loss, learning rate, samples/s, memory and time left: a live bar, or plain lines off a terminal.

    Samples per second leave evaluation out, as in a run's report; the time left does not.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start, self.first_step, self.samples, self.evaluated = 0.0, 0, 0, 0.0
        columns = ["{task.description}", "loss {task.fields[loss]}", "lr {task.fields[lr]}", "{task.fields[speed]}"]
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), *(TextColumn(text) for text in columns),
            TimeRemainingColumn(), TextColumn("left"), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None, loss="-", lr="-", speed="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first_step, self.samples, self.evaluated = time.monotonic(), state.global_step, 0, 0.0
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        if self.console.is_terminal:
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.evaluated += logs.get("eval_runtime", 0.0)
        if "eval_loss" in logs:
            score = f"  score {logs['eval_score']:.3f}" if "eval_score" in logs else ""
            score += f" ({cut:g} answers cut)" if (cut := logs.get("eval_cut")) else ""
            self.say(f"  step {state.global_step:>5}  validation loss {_in_words(logs['eval_loss'])}{score}")
        if "loss" not in logs:
            return
        steps, seconds = state.global_step - self.first_step, time.monotonic() - self.start
        self.samples += logs.get("samples", 0)
        speed = f"{self.samples / max(seconds - self.evaluated, 1e-9):.0f} samples/s  {peak_memory_gib():.1f} GiB"
        loss, lr = _in_words(logs["loss"]), f"{logs['learning_rate']:.1e}"
        self.bar.update(self.task, loss=loss, lr=lr, speed=speed)
        if not self.console.is_terminal:
            left = seconds / max(steps, 1) * (state.max_steps - state.global_step)
            self.say(
                f"  step {state.global_step:>5}/{state.max_steps}  loss {loss}  lr {lr}  {speed}  {left:.0f} s left"
            )

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Give the terminal back, however the run ended."""
        if self.bar.live.is_started:  # rich ends a bar that never began with an empty line
            self.bar.stop()


def _in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
