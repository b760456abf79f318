"""Exact match per task, by real generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qmixlora.data import Collator
from qmixlora.errors import UserError
from qmixlora.mixlora import device_of, routed_as


def normalize(answer: str) -> str:
    """What exact match compares: case, runs of blanks and a closing full stop do not count."""
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").rstrip().casefold()


def generate_answers(
    model: PeftModel, collator: Collator, rows: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> list[str]:
    """The model's answers to the last question of each conversation, greedy, in one left-padded batch."""
    inputs = on_device(collator.prompts(rows), device_of(model))
    tokenizer = collator.processor.tokenizer
    with torch.inference_mode(), routed_as(model, [row["task"] for row in rows]):
        tokens_BS = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new_BS = tokens_BS[:, inputs["input_ids"].shape[1] :]
    answers: list[str] = tokenizer.batch_decode(new_BS, skip_special_tokens=True)
    return answers


def answer_question(
    model: PeftModel, collator: Collator, question: str, image: Path | None, task: str | None, max_new_tokens: int
) -> str:
    """One answer to one question about a picture. Raises UserError if the picture is missing or unreadable."""
    if image is not None and not image.is_file():
        raise UserError("There is no such picture.", where=str(image))
    row = {
        "turns": [
            {"role": "user", "text": ("<image>\n" if image else "") + question},
            {"role": "assistant", "text": ""},
        ],
        "images": [{"path": str(image), "bytes": None}] if image else [],
        "task": task or "",
    }
    with evaluating(model):
        return generate_answers(model, collator, [row], max_new_tokens)[0].strip()


def answer_rows(
    model: PeftModel,
    collator: Collator,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The answer to every row, in their order. `on_progress` is told the number of samples done.

    Samples are batched in the order of their prompts' lengths; the answers do not depend on the batches.
    """
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: sum(len(turn["text"]) for turn in rows[index]["turns"]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found = generate_answers(model, collator, [rows[index] for index in batch], max_new_tokens)
            for index, answer in zip(batch, found, strict=True):
                answers[index] = answer
            on_progress(min(start + batch_size, len(order)))
    return answers


def score(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], split: str) -> dict[str, Any]:
    """Exact match per task: `{"split", "mean_exact_match", "tasks": {name: {"exact_match", "count"}}}`.

    The mean is over tasks, each counting the same. Raises UserError if there are no rows.
    """
    hits: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        hits.setdefault(row["task"], []).append(normalize(answer) == normalize(row["turns"][-1]["text"]))
    return summarize(hits, split)


def evaluate(
    model: PeftModel,
    collator: Collator,
    rows: Sequence[Mapping[str, Any]],
    *,
    split: str,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """`score` of what the model answers (`answer_rows`)."""
    answers = answer_rows(
        model, collator, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, on_progress=on_progress
    )
    return score(rows, answers, split)


def summarize(hits: Mapping[str, Sequence[bool]], split: str) -> dict[str, Any]:
    """The contents of `evaluation.json` from each task's hits. Raises UserError if there are none."""
    if not hits:
        raise UserError("There is nothing to evaluate.", where=f"split {split}")
    tasks = {
        task: {"exact_match": sum(values) / len(values), "count": len(values)} for task, values in sorted(hits.items())
    }
    mean = sum(float(task["exact_match"]) for task in tasks.values()) / len(tasks)
    return {"split": split, "mean_exact_match": mean, "tasks": tasks}


def blind_baseline(train: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    """What can be scored without looking: to each question, the answer it had most often in training.

    Where a question is new, the most frequent answer of its task (of all tasks, if the task is new too).
    """
    counts: dict[tuple[str, ...], dict[str, int]] = {}
    for row in train:
        question, answer = _question(row), normalize(row["turns"][-1]["text"])
        for key in ((row["task"], question), (question,), (row["task"],), ()):
            counts.setdefault(key, {}).setdefault(answer, 0)
            counts[key][answer] += 1
    hits: dict[str, list[bool]] = {}
    for row in rows:
        question = _question(row)
        key = next(key for key in ((row["task"], question), (question,), (row["task"],), ()) if key in counts)
        guess = max(counts[key], key=lambda answer: counts[key][answer])
        hits.setdefault(row["task"], []).append(guess == normalize(row["turns"][-1]["text"]))
    return summarize(hits, split)


def _question(row: Mapping[str, Any]) -> str:
    return normalize(" ".join(turn["text"] for turn in row["turns"][:-1]))


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch with its tensors on the device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def indices_by_task(rows: Any) -> dict[str, list[int]]:
    """Where the samples of each task stand, the tasks sorted by name."""
    indices: dict[str, list[int]] = {}
    for index, task in enumerate(rows["task"]):
        indices.setdefault(task, []).append(index)
    return dict(sorted(indices.items()))


def only_tasks(rows: Any, tasks: Iterable[str], where: str) -> Any:
    """The rows of some tasks. Raises UserError for a task that the data does not have."""
    indices = indices_by_task(rows)
    chosen: list[int] = []
    for task in tasks:
        if task not in indices:
            known = ", ".join(indices)
            raise UserError(f"There is no task {task!r} in the data.", where=where, fix=f"Its tasks: {known}.")
        chosen += indices[task]
    return rows.select(chosen)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a block, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
