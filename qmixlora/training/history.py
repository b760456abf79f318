"""The history of a run: what each start changed, with what libraries and data; and what a start may not change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qmixlora.backbone import how_to_bring_back, others_in
from qmixlora.backbone.levers.table import LEVERS
from qmixlora.backbone.weights import WEIGHTS
from qmixlora.errors import UserError, typed
from qmixlora.files import append_to_log, read_log, replacing
from qmixlora.recipe import Model, Recipe, leaves, load_run_recipe

RECIPE, HISTORY = "recipe.yaml", "history.jsonl"  # in a run's folder
LIBRARIES = ("qmixlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
PROCESSES = "processes"  # no key of a recipe
BATCH = ("train.micro_batch_size", "train.gradient_accumulation", PROCESSES)  # their product may not change
# besides memory levers with which a run learns the same; of the data, as long as its rows are the same
MAY_CHANGE = (
    "train.output", "train.epochs", "train.max_steps", "train.max_minutes", "train.on_oom", "train.on_nan",
    "train.log_every", "train.eval_every", "train.eval_generate", "train.early_stopping", "train.report_to",
    "train.save_every", "train.keep_checkpoints", "train.max_new_tokens", "train.cache_features",
    "model.attention", "model.trust_remote_code", "data", "export",
)  # fmt: skip
FREE_IN_A_NEW_RUN = ("adapter.dropout", "adapter.task_mix")
# of the data: what samples are, and their order
MAY_NOT_CHANGE = ("data.max_image_tokens", "data.special_tokens", "data.group_by_length")
Event = Literal["started", "resumed", "adapted", "finished"]


@dataclass(frozen=True)
class Change:
    """A value of the recipe that differs from the run's own."""

    path: str
    own: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.own} -> {self.new}"


def own_recipe(folder: Path) -> Recipe | None:
    """The recipe that a run's folder holds, if it holds one."""
    return load_run_recipe(folder) if (folder / RECIPE).is_file() else None


def changes_of(own: Recipe, new: Recipe) -> list[Change]:
    """The values of a recipe that are not those of a run's own."""
    written = {"data": {"held_out", "learned"}, "model": {"learned_on"}}  # by the run itself
    before, after = (dict(leaves(one.with_absolute_paths().model_dump(exclude=written))) for one in (own, new))
    paths = sorted({*before, *after}, key=[*after, *before].index)
    return [Change(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def refused(changes: list[Change], new: Recipe, own: Recipe) -> list[Change]:
    """The changes with which a checkpoint would mean something else."""
    was, now = next(((change.own, change.new) for change in changes if change.path == PROCESSES), (1, 1))
    spec, before = new.train, own.train
    same_batch = (
        spec.micro_batch_size * spec.gradient_accumulation * now
        == before.micro_batch_size * before.gradient_accumulation * was
    )
    may = (*MAY_CHANGE, *(lever.key for lever in LEVERS if lever.learns_the_same and lever.key not in BATCH))
    may += BATCH if same_batch else ()
    may += ("model.id", "model.revision") if WEIGHTS in own.model.learned_on else ()  # which are compared
    return [
        change
        for change in changes
        if change.path in MAY_NOT_CHANGE or not any(f"{change.path}.".startswith(f"{path}.") for path in may)
    ]


def check_changes(folder: Path, new: Recipe, processes: int = 1) -> list[Change]:
    """What a recipe changes of a run that is to go on, in so many processes.

    Raises UserError, by name, for what a run cannot change.
    """
    own, before = own_recipe(folder), History(folder).processes()
    changes = [] if own is None else changes_of(own, new)
    if before != processes:
        changes.append(Change(PROCESSES, before, processes))
    if own is not None and (wrong := refused(changes, new, own)):
        raise UserError(
            "A run goes on with what its checkpoints were trained with, and these differ:\n"
            + "\n".join(f"    {change}" for change in wrong),
            where=str(folder / RECIPE),
            fix=f"Leave them as they were (`{typed('train', folder, '--resume')}` takes the run's own "
            f"recipe), or start a new run from what this one learned: --init-from {folder}, with another train.output.",
        )
    return changes


def check_same_adapter(recipe: Recipe, tasks: Sequence[str], run: Path) -> None:
    """Raise UserError if a run's adapter does not fit a recipe's adapter and model, by name."""
    adapter = run / "adapter" / "adapter_config.json"
    if (own := own_recipe(run)) is None or not adapter.is_file():
        raise UserError(
            "This is not the folder of a finished run (recipe.yaml and adapter/).",
            where=f"--init-from {run}",
            fix="Name the folder of a run that came to its end.",
        )
    sections = ("adapter.", "model.id", "model.quantization")
    wrong = [
        str(change)
        for change in refused(changes_of(own, recipe), recipe, own)
        if change.path.startswith(sections) and change.path not in FREE_IN_A_NEW_RUN
    ]
    labels = json.loads(adapter.read_text(encoding="utf-8")).get("tasks")
    if labels is not None and labels != [*tasks]:
        wrong.append(f"tasks: {', '.join(labels)} -> {', '.join(tasks)}")
    if wrong:
        raise UserError(
            "The adapter to begin with is of another kind:\n" + "\n".join(f"    {change}" for change in wrong),
            where=f"--init-from {run}",
            fix="Give the new recipe the values of that run, or begin with a fresh adapter.",
        )


def check_same_base(model: Model, run: Path) -> None:
    """Raise UserError if a model that was loaded has other weights than those that a run learned on, or reads texts or
    images in another way.
    """
    own = own_recipe(run)
    if own is not None and (others := others_in(own.model.learned_on, model.learned_on)):
        again = how_to_bring_back(own.model.learned_on, model.learned_on)
        raise UserError(
            f"Of the model, this is not what the run in {run} learned on: {others}.",
            where=f"model.id: {model.id}",
            fix=f"To go on from what it learned, {again}; or begin a new run on this model with a fresh adapter.",
        )


class History:
    """`history.jsonl` of a run: one object per start and end, with `event`, `step`, `changed` and library `versions`.

    People find it at the end of `recipe.yaml`, as comments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> bool:
        """Whether the run's last start came to its end."""
        records = self._records()
        return bool(records) and records[-1].get("event") == "finished"

    def finished_at(self) -> int | None:
        """The step at which the run's last start came to its end; None for a run that did not."""
        return int(self._records()[-1]["step"]) if self.finished() else None

    def stopped_early(self) -> tuple[int, int] | None:
        """The step at which `train.early_stopping` ended a finished run, and the steps that it was to take."""
        last = self._records()[-1] if self.finished() else {}
        step, steps = int(last.get("step", 0)), int(last.get("steps", 0))  # earlier releases did not write `steps`
        return (step, steps) if step < steps else None

    def kept_step(self) -> int | None:
        """The step that the adapter in the run's folder is of; None where that is not known."""
        ends = [record for record in self._records() if record.get("event") == "finished"]
        return int(ends[-1].get("kept_step", ends[-1]["step"])) if ends else None

    def processes(self) -> int:
        """The number of processes of the run's last start."""
        return next((int(record["processes"]) for record in reversed(self._records()) if "processes" in record), 1)

    def check_data(self, digest: str) -> None:
        """Raise UserError if the training rows are others than those that the run began with."""
        own = next((record["data"] for record in self._records() if "data" in record), digest)
        if own != digest:
            raise UserError(
                "The training data is not what the run began with (rows, their order, or names of images differ; or "
                "an earlier release cut other rows from it).",
                where=str(self.folder / RECIPE),
                fix=f"Bring the data back, or start a new run from what this one learned: --init-from {self.folder}.",
            )

    def other_libraries(self) -> list[str]:
        """The libraries whose versions are not those of the run's last start, each in words."""
        own: dict[str, str] = next(
            (record["versions"] for record in reversed(self._records()) if "versions" in record), {}
        )
        return [f"{name}: {own[name]} -> {now}" for name, now in _versions().items() if own.get(name, now) != now]

    def add(self, event: Event, step: int, recipe: Recipe, changed: Mapping[str, Any], **facts: Any) -> None:
        """Write what begins or has ended: the recipe as it is from now on, and how it came to be so."""
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step}
        append_to_log(self.folder / HISTORY, {**record, "changed": dict(changed), **facts, "versions": _versions()})
        text = recipe.with_absolute_paths().to_yaml()
        lines = "".join(f"# {_in_words(record)}\n" for record in self._records())
        with replacing(self.folder / RECIPE) as temporary:
            temporary.write_text(f"{text}\n# History\n{lines}", encoding="utf-8")

    def _records(self) -> list[dict[str, Any]]:
        return read_log(self.folder / HISTORY)


def _in_words(record: Mapping[str, Any]) -> str:
    changed = ", ".join(f"{path}: {json.dumps(value)}" for path, value in record.get("changed", {}).items())
    origin = f" from {record['init_from']}" if record.get("init_from") else ""
    versions = record.get("versions", {})
    libraries = " ".join(
        f"{name} {versions[name]}" for name in ("qmixlora", "torch", "transformers") if name in versions
    )
    event = f"{record.get('time')} {record.get('event')} at step {record.get('step')}{origin}"
    return f"{event}{f'; {changed}' if changed else ''} ({libraries})"


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a copy that was not installed
            continue
    return versions
