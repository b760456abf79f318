"""Answers by real generation, greedy, in left-padded batches.

Shapes: B rows of a batch, S tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qmixlora.data import Conversation, answers_by_task, too_long_to_generate
from qmixlora.mixlora import routed_as
from qmixlora.session import Session


@dataclass(frozen=True)
class Answer:
    """What a model said; whether it was cut, since it had as many tokens as it may have and no end; and its share of
    its batch's seconds.
    """

    text: str
    cut: bool = False
    seconds: float | None = None


def generate_answers(
    session: Session,
    rows: Sequence[Conversation],
    max_new_tokens: int | None = None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The model's answers to the last question of each conversation, in one batch.

    `max_new_tokens` is the recipe's (`train.max_new_tokens`) unless given; a `streamer` gets the tokens of one
    conversation as they come.
    """
    tokens_BS, _ = _generated(session, rows, max_new_tokens, streamer)
    return session.collator.decode(tokens_BS)


def _generated(
    session: Session, rows: Sequence[Conversation], max_new_tokens: int | None, streamer: BaseStreamer | None = None
) -> tuple[Tensor, list[bool]]:
    """The tokens of `generate_answers`, and of which rows they were cut."""
    inputs, routing = session.collator.routed_prompts(rows)
    inputs, longest = session.on_device(inputs), max_new_tokens or session.recipe.train.max_new_tokens
    with torch.inference_mode(), routed_as(session.model, **routing), plain_greedy(session):
        model: Any = session.model  # PEFT forwards `generate` to whatever it wraps
        tokens_BS: Tensor = model.generate(**inputs, max_new_tokens=longest, streamer=streamer)
    own_BS, stops = tokens_BS[:, inputs["input_ids"].shape[1] :], set(stop_ids(session))
    return own_BS, [len(own_S) >= longest and stops.isdisjoint(own_S) for own_S in own_BS.tolist()]


@contextmanager
def plain_greedy(session: Session) -> Iterator[None]:
    """Let `generate` take the likeliest token every time, whatever the checkpoint's generation config says.

    Of that config the tokens that end an answer stay, beside those that the run's answers end in. (It is put aside:
    transformers takes from it whatever the config of a call leaves open, such as a repetition penalty.)
    """
    backbone, own = session.backbone, session.backbone.generation_config
    backbone.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=stop_ids(session),
        pad_token_id=session.collator.pad_token_id,
    )
    try:
        yield
    finally:
        backbone.generation_config = own


def stop_ids(session: Session) -> list[int]:
    """The tokens that generation stops at: those of the checkpoint's generation config, and the collator's."""
    own = session.backbone.generation_config.eos_token_id
    of_checkpoint = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*of_checkpoint, *session.collator.stop_ids})


def too_long_to_answer(session: Session, rows: Dataset) -> str | None:
    """What to say, before rows are answered, of references that are longer than `train.max_new_tokens`, if some are."""
    answers = answers_by_task(rows).values()
    return too_long_to_generate(answers, session.collator, session.recipe.train.max_new_tokens)


def answer_rows(
    session: Session,
    rows: Sequence[Conversation],
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The answer to every row, in their order. `on_progress` is told the number of samples done.

    Batch size and longest answer are the recipe's (`train.eval_batch_size`, `train.max_new_tokens`) unless given.
    Samples are batched in the order of their prompts' lengths; the answers do not depend on the batches.
    """
    size = batch_size or session.recipe.train.eval_batch_size
    return [answer.text for answer in full_answers(session, rows, size, max_new_tokens, on_progress)]


def full_answers(
    session: Session,
    rows: Sequence[Conversation],
    size: int,
    max_new_tokens: int | None,
    on_progress: Callable[[int], None],
) -> list[Answer]:
    """The answers of `answer_rows`, in batches of a size, with all that is known of them."""
    answers = [Answer("")] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: sum(len(turn["text"]) for turn in rows[index]["turns"]))
    with session.evaluating():
        for start in range(0, len(order), size):
            alike = order[start : start + size]
            for own in session.collator.of_one_kind([rows[index] for index in alike]):
                batch, begun = [alike[number] for number in own], time.monotonic()
                tokens_BS, were_cut = _generated(session, [rows[index] for index in batch], max_new_tokens)
                texts, seconds = session.collator.decode(tokens_BS), (time.monotonic() - begun) / len(batch)
                for index, text, was_cut in zip(batch, texts, were_cut, strict=True):
                    answers[index] = Answer(text, was_cut, seconds)
            on_progress(min(start + size, len(order)))
    return answers
