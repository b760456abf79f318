"""What the JSON files in a run's folder hold, as far as a report shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class _Contents(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class SplitSurvey(_Contents):
    """A split in `survey.json`: its samples, those left out and those used by task, and lengths in tokens by name."""

    split: str
    samples: int
    left_out: int
    tasks: dict[str, int]
    tokens: dict[str, float] | None = None


class Survey(_Contents):
    """`survey.json`: the splits of the data, and what in them is likely a mistake."""

    splits: list[SplitSurvey] = []
    warnings: list[str] = []


class Plan(_Contents):
    """`plan.json`: the GiB of the card, and those that were planned for; None where there is none."""

    card_gib: float | None = None
    peak_gib: float | None = None


class Interference(_Contents):
    """`interference.json`: by pool, what a step for the column's task does for the row's (T x T; None: no ratio)."""

    tasks: list[str]
    mean: dict[str, list[list[float | None]]]

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        count = len(self.tasks)
        if not count or not all([len(row) for row in rows] == [count] * count for rows in self.mean.values()):
            raise ValueError(f"mean is not of {count} x {count} values")
        return self


class UpdateError(_Contents):
    """The share of the update that no static adapter has."""

    mean: float


class ExportFidelity(_Contents):
    """`fidelity.json` of an export: its scores (`exact_match`) beside the live model's, and how often its words are the
    live model's (`agreement`), by form; `folder` is where it was made.
    """

    form: Literal["lora", "merged", "gguf"]
    folder: str
    rank: int
    polish_steps: int
    split: str
    exact_match: dict[str, float]
    agreement: dict[str, float]
    update_error: UpdateError

    @model_validator(mode="after")
    def _has_its_own(self) -> Self:
        missing = [f"exact_match.{name}" for name in ("live", self.form) if name not in self.exact_match]
        missing += [f"agreement.{self.form}"] if self.form not in self.agreement else []
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return self

    @property
    def name(self) -> str:
        """The export's name in `exports/`."""
        return Path(self.folder).name
