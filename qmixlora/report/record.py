"""What a run's folder holds, for its report: every file read as far as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qmixlora.errors import UserError
from qmixlora.evaluation import Scores
from qmixlora.evaluation.results import predictions_file, read_results, results_file
from qmixlora.files import read_log
from qmixlora.recipe import Recipe, load_run_recipe

from .contents import ExportFidelity, Interference, Plan, Survey
from .routing import RoutingSummary, routing_of

REPORT = "report.html"
Contents = TypeVar("Contents", bound=BaseModel)


STARTS = ("resumed", "adapted")  # events of a history; of the first start nothing comes before


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, by what they hold; None or empty where there is none; `damaged`: what is left out."""

    folder: Path
    name: str
    recipe: Recipe
    text: str  # of recipe.yaml
    history: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    survey: Survey | None
    plan: Plan | None
    routing: RoutingSummary | None
    interference: Interference | None
    exports: list[ExportFidelity]
    scores: tuple[str, Scores] | None  # the first split that was evaluated, and its scores
    backbone_scores: Scores | None  # of the bare backbone on the same split
    damaged: list[str]

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> RunRecord:
        """Read a run's folder, whose name it has unless it is given one. Raises UserError if it is none, or what it
        holds is damaged.
        """
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            raise UserError(
                "This is not the folder of a run: it has no recipe.yaml.",
                where=str(folder),
                fix="Name train.output of a run.",
            )
        files = _Files(folder)
        found = ((split, files.read_scores(split)) for split in ("test", "validation"))
        scores = next(((split, own) for split, own in found if own is not None), None)
        return cls(
            folder=folder,
            name=name or folder.resolve().name,
            recipe=load_run_recipe(folder),
            text=recipe.read_text(encoding="utf-8", errors="replace"),
            history=read_log(folder / "history.jsonl"),
            metrics=read_log(folder / "metrics.jsonl"),
            survey=files.read("survey.json", Survey),
            plan=files.read("plan.json", Plan),
            routing=routing_of(folder),
            interference=files.read("interference.json", Interference),
            exports=files.read_all("exports/*/fidelity.json", ExportFidelity),
            scores=scores,
            backbone_scores=files.read_scores(scores[0], backbone=True) if scores else None,
            damaged=files.damaged,
        )

    def logged(self, *keys: str) -> list[dict[str, Any]]:
        """The records of metrics.jsonl that have all these keys as numbers."""
        return [one for one in self.metrics if all(isinstance(one.get(key), int | float) for key in ("step", *keys))]

    def speeds(self) -> Iterator[tuple[int, float]]:
        """(step, samples per second) since the log of a loss before, or since the start of its own; evaluation left
        out.
        """
        spec = self.recipe.train
        start, step, seconds, evaluated = 0, 0, 0.0, 0.0
        for record in self.logged("seconds"):
            if (own := self._start_of(record)) != start:  # seconds count from 0 at every start
                start, step, seconds, evaluated = own, max(own, step), 0.0, 0.0
            evaluated += record.get("eval_runtime", 0.0)
            if "loss" not in record:
                continue
            steps, passed = record["step"] - step, record["seconds"] - seconds - evaluated
            if steps > 0 and passed > 0:
                # earlier releases logged no samples
                of_recipe = steps * spec.micro_batch_size * spec.gradient_accumulation
                yield record["step"], record.get("samples", of_recipe) / passed
            step, seconds, evaluated = record["step"], record["seconds"], 0.0

    def _start_of(self, record: dict[str, Any]) -> int:
        """The step that the run had gone on from which logged a record. Earlier releases say it in the history alone:
        the last start before a step has logged it, as each removes what others had logged after its own.
        """
        if isinstance(record.get("start"), int):
            return int(record["start"])
        begun = [one.get("step") for one in self.history if one.get("event") in STARTS]
        before = (step for step in reversed(begun) if isinstance(step, int) and step < record["step"])
        return next(before, 0)

    @property
    def versions(self) -> dict[str, str]:
        """The libraries of the last start."""
        return next((one["versions"] for one in reversed(self.history) if isinstance(one.get("versions"), dict)), {})

    @property
    def fingerprint(self) -> str | None:
        """What tells the training data apart."""
        return next((one["data"] for one in self.history if isinstance(one.get("data"), str)), None)


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the folders of runs, each named by the shortest end of its path that no other has.

    Raises:
        UserError: one is named twice, is no run's, or a file in it is damaged.
    """
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for folder, path in zip(folders, paths, strict=True):
        ends = (path[-length:] for length in range(1, 1 + len(path)))
        told = next((end for end in ends if [other[-len(end) :] for other in paths].count(end) == 1), None)
        if told is None:
            raise UserError(f"{folder} is named twice.", where="runs")
        names.append(str(Path(*told)))
    return [RunRecord.read(folder, name) for folder, name in zip(folders, names, strict=True)]


@dataclass(frozen=True)
class _Files:
    """The JSON files of a run's folder; `damaged` grows by those that do not hold what they should."""

    folder: Path
    damaged: list[str] = field(default_factory=list)

    def read(self, name: str, contents: type[Contents]) -> Contents | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            text = json.dumps(json.loads(path.read_bytes()), ensure_ascii=False)
            return contents.model_validate_json(text.encode(errors="replace"))  # a folder's name may be no text
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            self.damaged.append(f"{name} ({where}{first['msg']})")
        except (OSError, ValueError) as error:
            self.damaged.append(f"{name} ({error})")
        return None

    def read_scores(self, split: str, *, backbone: bool = False) -> Scores | None:
        """The scores of a split; none where it was not evaluated, or by a release that kept no answers."""
        names = results_file(split, backbone=backbone), predictions_file(split, backbone=backbone)
        if not all((self.folder / name).is_file() for name in names):
            return None
        try:
            return read_results(self.folder, split, backbone=backbone)
        except UserError as error:
            self.damaged.append(error.what)
        return None

    def read_all(self, pattern: str, contents: type[Contents]) -> list[Contents]:
        paths = sorted(self.folder.glob(pattern))
        read = (self.read(path.relative_to(self.folder).as_posix(), contents) for path in paths)
        return [one for one in read if one is not None]
