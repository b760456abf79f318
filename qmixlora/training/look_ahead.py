"""Checks before the first step: no answer is visible while it is learned, and no picture before it is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from qmixlora.data import IGNORED, IMAGE, Collator, Conversation, ImageFile, open_images
from qmixlora.errors import UserError
from qmixlora.loss import supervised_logits_in_chunks
from qmixlora.session import TunedSession

TOLERANCE = 8  # times the precision of the model's dtype, of the largest logit
LOOKED_AT = 1000  # rows among which one with a picture in a later question is looked for


def check_look_ahead(session: TunedSession, rows: Dataset) -> None:
    """Check that the first row's answer is not seen before it is predicted, and, where pictures stand in later
    questions, that answers before do not see them. Raises UserError where they do.
    """
    _check_answers(session, rows[0])
    turns = rows.select_columns(["turns"]).select(range(min(LOOKED_AT, len(rows))))
    later = (index for index, row in enumerate(turns) if _later_picture(row) is not None)
    if not session.recipe.train.cache_features and (index := next(later, None)) is not None:  # none but those it has
        _check_pictures(session, rows[index])


def _check_answers(session: TunedSession, row: Conversation) -> None:
    """Raise UserError where another last token of a row's answer changes the logits of any token that it learns.

    Such a model reads answers in both directions (by what its processor adds to the inputs, such as `token_type_ids`),
    and would learn to copy what it cannot see in generation.
    """
    collator = session.collator
    batch = session.on_device(collator([row]))
    last = int((batch["labels"][0] != IGNORED).nonzero().max())
    changed = batch["input_ids"].clone()
    changed[0, last] = _another_token(collator, int(changed[0, last]))
    if _differ(session, batch, {**batch, "input_ids": changed}):
        raise UserError(
            f"{type(session.backbone).__name__} reads a token of the answer before it has to predict it, with the "
            "inputs that its processor makes: answers would be copied in training, and cannot be in generation.",
            where=f"model.id: {session.recipe.model.id}",
            fix="Use another family of models, whose decoder reads answers from the left alone.",
        )


def _check_pictures(session: TunedSession, row: Conversation) -> None:
    """Raise UserError where the first picture of a later question changes what stands before it: the tokens of earlier
    pictures (LLaVA-OneVision), or states (Molmo2, whose images are one block of attention).
    """
    collator, end = session.collator, _later_picture(row)
    assert end is not None, "a row with such a picture"
    before, whole = _up_to(row, end - 2), _up_to(row, end)
    other: Conversation = {**whole, "images": [*whole["images"][:-1], _inverted(whole["images"][-1])]}
    batch, changed = (collator([one]) for one in (whole, other))
    if not batch["segments"].any():
        return  # each answer is a sample of its own, in which nothing before it is taught
    asked, trained = collator.template.asked_with
    ids_S = collator.prompts([before])["input_ids"][0]
    is_same = not trained.startswith(asked) or torch.equal(ids_S, batch["input_ids"][0, : len(ids_S)])
    for one in (batch, changed):
        one["labels"] = one["labels"].masked_fill(one["segments"] == one["segments"].max(), IGNORED)
    if not is_same or _differ(session, session.on_device(batch), session.on_device(changed)):
        raise UserError(
            f"With {type(session.backbone).__name__}, a picture in a later question of a conversation changes what "
            "stands before it: earlier answers would be learned with what they cannot see in generation.",
            where=f"model.id: {session.recipe.model.id}",
            fix="Make one sample of each answer, or show all pictures in the first question.",
        )


def _later_picture(row: Mapping[str, Any]) -> int | None:
    """The number of turns up to the answer to the first later question with a picture, if there is one."""
    answers = 0
    for index, turn in enumerate(row["turns"]):
        if answers and turn["role"] != "assistant" and IMAGE in turn["text"]:
            return index + 2
        answers += turn["role"] == "assistant"
    return None


def _up_to(row: Conversation, end: int) -> Conversation:
    """The first `end` turns of a row, with their pictures."""
    turns = row["turns"][:end]
    shown = sum(turn["text"].count(IMAGE) for turn in turns)
    return {**row, "turns": turns, "images": row["images"][:shown], "tasks": [], "learned": []}


def _inverted(image: ImageFile) -> ImageFile:
    """Another picture of the same size."""
    from PIL import ImageOps

    (opened,) = open_images([image])
    file = io.BytesIO()
    ImageOps.invert(opened).save(file, "PNG")
    return {"path": "inverted.png", "bytes": file.getvalue()}


def _differ(session: TunedSession, batch: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Whether the logits of the supervised tokens of two batches differ by more than rounding."""
    chunk = session.recipe.train.loss_chunk  # as many logits at a time as in training
    with torch.no_grad(), session.evaluating():
        pairs = zip(
            *(supervised_logits_in_chunks(session.model, inputs, chunk) for inputs in (batch, changed)), strict=True
        )
        sizes = [(logits_CV.abs().max(), (logits_CV.float() - others_CV).abs().max()) for logits_CV, others_CV in pairs]
    largest, difference = (torch.stack(column).max() for column in zip(*sizes, strict=True))
    precision = torch.finfo(getattr(torch, session.recipe.model.dtype)).eps
    return bool(difference > TOLERANCE * precision * largest)


def _another_token(collator: Collator, token: int) -> int:
    """A token of ordinary text other than this one."""
    tokenizer = collator.processor.tokenizer
    texts = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in "ab")
    return int(next(other for other in texts if other != token))
