"""Training rows that are made once: tokens and pixels do not change from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qmixlora.data import IGNORED, Collator, load_conversations
from qmixlora.recipe import Recipe

FILL = {"labels": IGNORED, "routing_mask": False, "segments": -1}  # of padding; the tokenizer's own for tokens
Row = dict[str, Any]


@dataclass
class PreparedCollator(Collator):
    """The collator, of rows that it has made before."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        made: dict[int, Row] = {}
        for has_images in (True, False):
            own = [index for index in range(len(rows)) if bool(rows[index]["images"]) == has_images]
            for start in range(0, len(own), 256):
                chunk = own[start : start + 256]
                batch = super().__call__([rows[index] for index in chunk])
                named = ({name: rows[index][name] for name in ("turns", "images")} for index in chunk)  # for messages
                made |= {i: {**n, **own} for i, n, own in zip(chunk, named, self._parted(batch), strict=True)}
        return [made[index] for index in range(len(rows))]

    def _parted(self, batch: dict[str, Any]) -> list[Row]:
        """The rows of a batch without their padding."""
        names = [name for name in ("input_ids", *FILL) if name in batch]
        parted = []
        for index, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            row = {name: batch[name][index, :length].clone() for name in names}
            pixels = {"pixels": batch["pixel_values"][index].clone()} if "pixel_values" in batch else {}
            parted.append({**row, **pixels, "task": batch["tasks"][index]})
        return parted

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, **FILL}
        batch: dict[str, Any] = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
            if name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if pixels := [row["pixels"] for row in rows if "pixels" in row]:
            batch["pixel_values"] = torch.stack(pixels)
        return {**batch, "tasks": [row["task"] for row in rows]}


@cache
def prepared(model_id: str, file: Path, max_length: int) -> list[Row]:
    """The training rows, ready to be batched."""
    from transformers import AutoProcessor

    collator = PreparedCollator(AutoProcessor.from_pretrained(model_id), max_length)
    return collator.prepare(load_conversations(str(file)))


def training_rows(recipe: Recipe) -> list[Row]:
    return prepared(recipe.model.id, Path(recipe.data.sources[0]), recipe.data.max_length)


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The tasks that the answers of some rows belong to."""
    return sorted({task for row in rows for task in _tasks(row)})


def with_answers_of(rows: Iterable[Row], task: str) -> list[Row]:
    """The rows with answers of a task, which alone are supervised in them."""
    return [_with_answers_of(row, task) for row in rows if task in _tasks(row)]


def _with_answers_of(row: Row, task: str) -> Row:
    others = [number for number, own in enumerate(_tasks(row)) if own != task]
    if not others:
        return row
    of_others_S = torch.isin(row["segments"], torch.tensor(others))
    return {**row, "labels": row["labels"].masked_fill(of_others_S, IGNORED)}


def _tasks(row: Row) -> list[str]:
    """The task of every segment, or that of all."""
    return [row["task"]] if isinstance(row["task"], str) else row["task"]
