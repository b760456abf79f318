"""Answers by real generation, greedy, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qmixlora.data import Conversation
from qmixlora.mixlora import routed_as
from qmixlora.session import Session


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
    inputs, routing = session.collator.routed_prompts(rows)
    inputs, longest = session.on_device(inputs), max_new_tokens or session.recipe.train.max_new_tokens
    with torch.inference_mode(), routed_as(session.model, **routing), plain_greedy(session):
        model: Any = session.model  # PEFT forwards `generate` to whatever it wraps
        tokens_BS: Tensor = model.generate(**inputs, max_new_tokens=longest, streamer=streamer)
    return session.collator.decode(tokens_BS[:, inputs["input_ids"].shape[1] :])


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
    return [answer for answer, _ in timed_answers(session, rows, size, max_new_tokens, on_progress)]


def timed_answers(
    session: Session,
    rows: Sequence[Conversation],
    size: int,
    max_new_tokens: int | None,
    on_progress: Callable[[int], None],
) -> list[tuple[str, float]]:
    """The answers of `answer_rows`, in batches of a size, each with its share of its batch's seconds."""
    answers = [("", 0.0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: sum(len(turn["text"]) for turn in rows[index]["turns"]))
    with session.evaluating():
        for start in range(0, len(order), size):
            batch, begun = order[start : start + size], time.monotonic()
            generated = generate_answers(session, [rows[index] for index in batch], max_new_tokens)
            seconds = (time.monotonic() - begun) / len(batch)
            for index, answer in zip(batch, generated, strict=True):
                answers[index] = answer, seconds
            on_progress(min(start + size, len(order)))
    return answers
