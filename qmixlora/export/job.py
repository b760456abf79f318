"""An export job: a request on a run, which the passes share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import AutoConfig

from qmixlora.backbone import make_skeleton, source_of
from qmixlora.backbone.levers import has_quantized_parts
from qmixlora.bases import BASE, RECORD, Source
from qmixlora.bases import RECIPE as RECIPE
from qmixlora.data import Collator, indices_by_task, taught
from qmixlora.errors import UserError
from qmixlora.files import write_json
from qmixlora.manifest import seal
from qmixlora.progress import Tell, progress
from qmixlora.recipe import Recipe
from qmixlora.serving import making

from .fidelity import FIDELITY, Fidelity
from .merge import Base
from .targets import Request, Target

FOLDER = "exports"
TOLD = ("rank", "polish_steps", "base", "split", "samples")  # of a fidelity, where it is replaced


@dataclass(frozen=True)
class Job:
    """A request on a run: its folder, its recipe, and where people are told."""

    folder: Path
    recipe: Recipe
    request: Request
    console: Console
    collator: Collator

    @property
    def training_rows(self) -> Dataset:
        return self.rows("train")

    @property
    def validation_rows(self) -> Dataset | None:
        return self.rows("validation") if self.recipe.data.validation else None

    def rows(self, split: str) -> Dataset:
        """The rows of a split as the run was taught them."""
        if split not in self._rows:
            self._rows[split] = taught(self.recipe.data, self.collator, [split]).rows[split]
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, Dataset]:
        return {}

    @property
    def polish_steps(self) -> int:
        return self.recipe.export.polish if self.request.polish is None else self.request.polish

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The experts that the run had in NF4. Raises UserError as `make_skeleton`."""
        spec = self.recipe.model
        config = AutoConfig.from_pretrained(spec.id, **source_of(spec))
        return make_skeleton(config, spec)[1].experts_in_nf4 if spec.quantization == "nf4" else ()

    @property
    def base(self) -> Base:
        """The weights that merged checkpoints are made of; of a run that had none in NF4, the original ones."""
        return self.request.base if self.recipe.model.quantization == "nf4" else "original"

    @property
    def into_another_base(self) -> bool:
        """Whether merging is into other weights than the run's adapters lie on: into the original ones, or for a run
        with its experts, head, embeddings or vision tower in 8 or 4 bits, of which a merged checkpoint has the 16-bit
        ones.
        """
        spec = self.recipe.model
        from_nf4 = self.base == "original" and spec.quantization == "nf4"
        return from_nf4 or has_quantized_parts(spec) or bool(self.experts)

    @property
    def longest_fingerprint(self) -> int:
        """Tokens of an answer in a fingerprint, at most."""
        return min(self.recipe.train.max_new_tokens, making.MAX_TOKENS)

    @property
    def base_folder(self) -> Path:
        """The folder of the base that the run's LoRAs lie on."""
        return self.folder / FOLDER / BASE

    def source_on(self, base: Path | None) -> Source:
        """How the run's own base (None: its model) is loaded, by adapters that lie on it."""
        spec = self.recipe.model
        if base is None:
            return Source(spec.id, spec.revision, spec.trust_remote_code)
        return Source(str(base.resolve()), None, spec.trust_remote_code)

    def carry_base(self, folder: Path) -> Source:
        """Note in the folder of an export which base it lies on, if that is one of the run's own; returns the base."""
        if not (self.base_folder / RECORD).is_file():
            return self.source_on(None)
        shutil.copyfile(self.base_folder / RECORD, folder / RECORD)
        return self.source_on(self.base_folder)

    def folder_of(self, target: Target, form: str) -> Path:
        return self.folder / FOLDER / f"{target.name}-{form}"

    def finish(self, folder: Path, fidelity: Fidelity) -> None:
        """Put the run's recipe and the fidelity into the folder of an export, and seal it."""
        shutil.copyfile(self.folder / RECIPE, folder / RECIPE)
        write_json(folder / FIDELITY, fidelity.to_dict())
        seal(folder)

    def say_what_is_replaced(self, folder: Path, fidelity: Fidelity) -> None:
        """Tell if an earlier export is in an export's place, and how it was made otherwise."""
        if not folder.exists():
            return
        try:
            before = json.loads((folder / FIDELITY).read_text(encoding="utf-8"))
            told = {name: (before.get(name), value) for name, value in fidelity.to_dict().items() if name in TOLD}
        except (OSError, ValueError, AttributeError):
            told = {}
        changes = [f"{name} {old}, now {new}" for name, (old, new) in told.items() if old != new]
        self.say(f"{folder} is replaced ({'; '.join(changes) or 'made in the same way'}).")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def bar(self, text: str) -> Iterator[Tell]:
        """A line, and the progress of what it says, in bytes."""
        self.say(text)
        with progress(text, self.console, in_bytes=True) as tell:
            yield tell


def rows_of(rows: Dataset, target: Target, per_task: int | None, split: str) -> Dataset:
    """The first rows of every task of a target. Raises UserError if there are none."""
    by_task = indices_by_task(rows)
    chosen = [index for task in target.shares for index in by_task.get(task, [])[:per_task]]
    if not chosen:
        raise UserError(f"There is no sample of {', '.join(target.shares)} to measure on.", where=f"split {split}")
    return rows.select(chosen)
