"""What a key-value cache of a conversation goes on with: whole questions, with gates of their own, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qmixlora.data import IMAGE
from qmixlora.mixlora import routed_as
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from .conversations import CLOSE, ROUTES, conversation, logits_of, opened, padded_left, passed, up_to

Make = Callable[..., Recipe]
every_route = pytest.mark.parametrize("route_on", ROUTES)
IN_PARTS = "goes on with a question whose factors were chosen from its beginning"


@pytest.fixture
def session(make_recipe: Make) -> TunedSession:
    return opened(make_recipe)


def end_of_segment(batch: dict[str, Any], number: int) -> int:
    """The column behind the last token of the first sample's segment."""
    return int((batch["segments"][0] == number).nonzero()[-1]) + 1


def amid_question(batch: dict[str, Any], number: int) -> int:
    """A column in the question of the first sample's segment."""
    return int((batch["routing_mask"][0] & (batch["segments"][0] == number)).nonzero()[-2])


@every_route
def test_another_question_can_be_asked_behind_a_cache_that_is_cut_back_to_an_answer(
    make_recipe: Make, route_on: str
) -> None:
    session = opened(make_recipe, route_on=route_on)
    batch, other = (session.collator([conversation(session.recipe, 0, *turns)]) for turns in ((1, 2), (3,)))
    kept = int((batch["segments"][0] == 0).sum())
    cache = passed(session, batch, 0, batch["input_ids"].shape[1]).past_key_values
    cache.crop(kept - cache.get_seq_length())
    made = passed(session, other, kept, other["input_ids"].shape[1], cache).logits
    torch.testing.assert_close(made, logits_of(session.model, other)[:, kept:], **CLOSE)


def test_a_cache_that_is_cut_back_into_an_earlier_answer_is_refused(session: TunedSession) -> None:
    batch = session.collator([conversation(session.recipe, 0, 1, 2)])
    kept = int((batch["segments"][0] == 0).sum()) - 2
    cache = passed(session, batch, 0, batch["input_ids"].shape[1]).past_key_values
    cache.crop(kept - cache.get_seq_length())
    with pytest.raises(ValueError, match="cut back into an earlier question or answer"):
        passed(session, batch, kept, kept + 4, cache)


def test_a_cache_goes_on_with_its_own_factors_after_another_batch(session: TunedSession) -> None:
    long, short = (session.collator([conversation(session.recipe, *turns)]) for turns in ((0, 1, 2), (3,)))
    width = long["input_ids"].shape[1]
    cache = passed(session, long, 0, width - 1).past_key_values
    passed(session, short, 0, short["input_ids"].shape[1])
    made = passed(session, long, width - 1, width, cache).logits
    torch.testing.assert_close(made, logits_of(session.model, long)[:, -1:], **CLOSE)


def test_a_cache_repeated_for_several_answers_is_refused(session: TunedSession) -> None:
    batch = session.collator([conversation(session.recipe, 0, 1)])
    cache = passed(session, batch, 0, batch["input_ids"].shape[1]).past_key_values
    cache.batch_repeat_interleave(2)
    with torch.no_grad(), pytest.raises(ValueError, match="for 2 sequences is not as the last pass of the mixture"):
        session.model(input_ids=batch["input_ids"][:, -1:].repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("route_on", ["instruction", "embedding"])
def test_a_question_in_two_passes_is_refused(make_recipe: Make, route_on: str, number: int) -> None:
    """The gates would be those of its first part, though it is told where it ends."""
    session = opened(make_recipe, route_on=route_on)
    batch = session.collator([conversation(session.recipe, 0, 1)])
    middle, end = amid_question(batch, number), batch["input_ids"].shape[1]
    cache = passed(session, batch, 0, middle).past_key_values
    with pytest.raises(ValueError, match=IN_PARTS):
        passed(session, batch, middle, end, cache)


def test_a_question_in_two_passes_has_the_gates_of_its_task(make_recipe: Make) -> None:
    session = opened(make_recipe, route_on="task")
    batch = session.collator([conversation(session.recipe, 0, 1, tasks=["color", "digit"])])
    middle, end = amid_question(batch, 1), batch["input_ids"].shape[1]
    first = passed(session, batch, 0, middle)
    rest = passed(session, batch, middle, end, first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), logits_of(session.model, batch), **CLOSE)


@pytest.mark.parametrize("turns", [(0,), (0, 1)])
def test_a_cache_that_is_cut_back_into_the_last_question_is_refused(
    session: TunedSession, turns: tuple[int, ...]
) -> None:
    batch = session.collator([conversation(session.recipe, *turns)])
    other = session.collator([conversation(session.recipe, *turns[:-1], 2)])
    cache = passed(session, batch, 0, batch["input_ids"].shape[1]).past_key_values
    kept = amid_question(other, len(turns) - 1)
    cache.crop(kept - cache.get_seq_length())
    with pytest.raises(ValueError, match=IN_PARTS):
        passed(session, other, kept, other["input_ids"].shape[1], cache)


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 3}])
def test_generate_goes_on_from_the_end_of_an_answer_alone(session: TunedSession, how: dict[str, Any]) -> None:
    """Not behind a part of the question, which several questions share, and not in chunks."""
    row = conversation(session.recipe, 0, 1)
    batch = session.collator([row])
    inputs, routing = session.collator.routed_prompts([up_to(row, 1)])
    kept = end_of_segment(batch, 0) if how else amid_question(batch, 1)
    cache = copy.deepcopy(passed(session, batch, 0, kept).past_key_values)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with routed_as(session.model, **routing), pytest.raises(ValueError, match=IN_PARTS):
        session.model.generate(**rest, past_key_values=cache, max_new_tokens=2, do_sample=False, **how)


def test_an_answer_of_as_many_tokens_as_its_prompt_is_no_question(session: TunedSession) -> None:
    """What `routed_as` tells is of the whole sequence."""
    inputs, routing = session.collator.routed_prompts([conversation(session.recipe, 0, 1)])
    with torch.no_grad(), routed_as(session.model, **routing):
        cache = session.model(**inputs, use_cache=True).past_key_values
        session.model(input_ids=inputs["input_ids"], past_key_values=cache)


@pytest.mark.parametrize("turns", [(3,), (3, 1)])
def test_a_batch_is_cut_back_to_where_a_sample_has_padding_alone(session: TunedSession, turns: tuple[int, ...]) -> None:
    long, short = conversation(session.recipe, 0, 1, 2, 3), conversation(session.recipe, *turns)
    spoken: Any = [{**turn, "text": turn["text"].removeprefix(f"{IMAGE}\n")} for turn in short["turns"]]
    rows: list[Any] = [long, {**short, "turns": spoken, "images": []}]
    batch = padded_left(session.collator(rows))
    kept, end = end_of_segment(batch, 0), batch["input_ids"].shape[1]
    assert (batch["segments"][1, :kept] == -1).all()
    whole = passed(session, batch, 0, end)
    whole.past_key_values.crop(kept - end)
    rest = passed(session, batch, kept, end, whole.past_key_values).logits
    real_BS = batch["attention_mask"][:, kept:].bool()
    torch.testing.assert_close(rest[real_BS], whole.logits[:, kept:][real_BS], **CLOSE)


def test_a_cache_is_cut_back_to_padding_behind_an_answer(session: TunedSession) -> None:
    """As in a batch that has grown turn by turn, where another sample's answer was longer."""
    batch = session.collator([conversation(session.recipe, 0, 1, 2)])
    end = end_of_segment(batch, 0)
    padding = {"input_ids": 0, "attention_mask": 0, "segments": -1, "routing_mask": False}
    for name, value in padding.items():
        own = batch[name]
        batch[name] = torch.cat([own[:, :end], torch.full_like(own[:, :2], value), own[:, end:]], dim=1)
    whole = passed(session, batch, 0, batch["input_ids"].shape[1])
    whole.past_key_values.crop(end + 2 - batch["input_ids"].shape[1])
    rest = passed(session, batch, end + 2, batch["input_ids"].shape[1], whole.past_key_values).logits
    torch.testing.assert_close(rest, whole.logits[:, end + 2 :], **CLOSE)
