"""The k-th answer of a conversation has the logits that it was taught with, however it is generated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qmixlora.data import IGNORED
from qmixlora.evaluation import generate_answers
from qmixlora.mixlora import routed_as
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from .conversations import CLOSE, ROUTES, conversation, logits_of, mixed_rows, opened, up_to

Make = Callable[..., Recipe]
every_route = pytest.mark.parametrize("route_on", ROUTES)


@pytest.fixture
def session(make_recipe: Make) -> TunedSession:
    return opened(make_recipe)


def answers_taught(session: TunedSession, rows: list[Any]) -> list[list[Tensor]]:
    """Of every sample and answer, the logits that its tokens are learned by."""
    batch = session.collator(rows)
    logits_BSV, made = logits_of(session.model, batch), []
    for labels_S, segments_S, logits_SV in zip(batch["labels"], batch["segments"], logits_BSV, strict=True):
        numbers = range(int(segments_S.max()) + 1)
        at = [((labels_S != IGNORED) & (segments_S == number)).nonzero()[:, 0] - 1 for number in numbers]
        made.append([logits_SV[positions] for positions in at])
    return made


@pytest.mark.parametrize("pairing", ["tied", "conditional"])
@every_route
def test_a_history_that_is_prefilled_at_once_gives_the_logits_that_were_taught(
    make_recipe: Make, route_on: str, pairing: str
) -> None:
    """Left-padded prompts of mixed numbers of turns, then the answer's own tokens one by one, from the cache."""
    session = opened(make_recipe, route_on=route_on, pairing=pairing)
    rows = [conversation(session.recipe, 3, 0), mixed_rows(session.recipe)[0], conversation(session.recipe, 2)]
    taught = [own[-1] for own in answers_taught(session, rows)]
    inputs, routing = session.collator.routed_prompts(rows)
    batch = session.collator(rows)
    answers = [ids_S[labels_S != IGNORED] for ids_S, labels_S in zip(batch["input_ids"], batch["labels"], strict=True)]
    with torch.no_grad(), routed_as(session.model, **routing):
        out = session.model(**inputs, use_cache=True)
        steps = [out.logits[:, -1]]
        for step in range(min(map(len, taught)) - 1):
            tokens_B1 = torch.stack(
                [own[len(own) - len(last) + step] for own, last in zip(answers, taught, strict=True)]
            )[:, None]
            attention = torch.ones(len(rows), inputs["input_ids"].shape[1] + step + 1, dtype=torch.long)
            attention[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
            out = session.model(input_ids=tokens_B1, attention_mask=attention, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    for index, expected in enumerate(taught):
        own = torch.stack([step[index] for step in steps])
        torch.testing.assert_close(own, expected[: len(steps)], **CLOSE)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("pairing", ["tied", "conditional"])
@every_route
def test_a_history_in_the_cache_gives_the_logits_that_were_taught(
    make_recipe: Make, route_on: str, pairing: str, chunk: int
) -> None:
    """A conversation in passes: each question at once, each answer (and the token that ends it, which generation leaves
    out of the cache) so many tokens at a time; or the end of an answer with the next question.
    """
    session = opened(make_recipe, route_on=route_on, pairing=pairing)
    row = mixed_rows(session.recipe)[0]
    batch = session.collator([row])
    taught = logits_of(session.model, batch)
    segments, mask = batch["segments"], batch["routing_mask"][0]
    starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]  # where later questions begin
    ends = sorted({0, *(i - 1 for i in starts), *(i for i in range(1, len(mask)) if mask[i - 1] and not mask[i])})
    passes = []
    for start, end in itertools.pairwise([*ends, len(mask)]):
        whole = bool(mask[start:end].any())
        passes += [(start, end)] if whole else [(i, min(i + chunk, end)) for i in range(start, end, chunk)]
    made, cache = [], None
    for start, end in passes:
        inputs = {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}
        pixels = {} if start else {"pixel_values": batch["pixel_values"]}
        with (
            torch.no_grad(),
            routed_as(session.model, batch["tasks"], segments=segments, routing_mask=batch["routing_mask"]),
        ):
            out = session.model(**inputs, **pixels, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made.append(out.logits)
    assert len(passes) >= 5
    torch.testing.assert_close(torch.cat(made, dim=1), taught, **CLOSE)


@every_route
def test_generate_goes_on_from_the_cache_as_with_the_history_at_once(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    row = mixed_rows(session.recipe)[0]
    prompts = [session.collator.routed_prompts([up_to(row, answer)]) for answer in range(3)]
    how: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def generated(answer: int, cache: Any) -> Any:
        inputs, routing = prompts[answer]
        rest = {name: value for name, value in inputs.items() if cache is None or name != "pixel_values"}
        with routed_as(session.model, **routing):
            return session.model.generate(
                **rest, past_key_values=cache, **how, output_logits=True, return_dict_in_generate=True
            )

    cache, from_cache = None, []
    for answer in range(3):
        out = generated(answer, cache)
        from_cache.append(torch.stack(out.logits))
        cache = out.past_key_values
        # the data goes on with another answer than was generated
        cache.crop(prompts[answer][0]["input_ids"].shape[1] - cache.get_seq_length())
    taught = answers_taught(session, [row])[0]
    for answer, own in enumerate(from_cache):
        torch.testing.assert_close(own, torch.stack(generated(answer, None).logits), **CLOSE)
        torch.testing.assert_close(own[0], taught[answer][:1], **CLOSE)


def test_beams_of_a_conversation_are_routed_alike(session: TunedSession) -> None:
    inputs, routing = session.collator.routed_prompts(mixed_rows(session.recipe))
    with routed_as(session.model, **routing):
        session.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=3)
        of_beams = session.model.base_model.last_selection().unflatten(1, (3, 3))
        session.model.generate(**inputs, do_sample=False, max_new_tokens=3)
        alone = session.model.base_model.last_selection()
    torch.testing.assert_close(of_beams, alone[:, :, None].expand_as(of_beams))


def test_our_own_evaluation_answers_with_the_segments_of_the_history(session: TunedSession) -> None:
    """As the teacher-forced model would, whose likeliest token is looked up again and again."""
    rows = [conversation(session.recipe, 3, 0), mixed_rows(session.recipe)[0], conversation(session.recipe, 2)]
    answers = generate_answers(session, rows, 4)
    for row, answer in zip(rows, answers, strict=True):
        tokens: list[int] = []
        inputs, routing = session.collator.routed_prompts([row])
        for _ in range(4):
            ids = torch.tensor([tokens], dtype=torch.long)
            whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            with torch.no_grad(), routed_as(session.model, **routing):
                tokens.append(int(session.model(**whole, use_cache=False).logits[0, -1].argmax()))
        assert session.collator.decode(torch.tensor([tokens])) == [answer]


def test_a_question_alone_is_of_its_own_task_not_of_the_conversations_last(make_recipe: Make) -> None:
    session = opened(make_recipe, route_on="task")
    batch = session.collator([conversation(session.recipe, 0, 1, tasks=["color", "digit"])])
    taught = logits_of(session.model, batch)
    end = int((batch["segments"][0] == 0).sum()) - 2
    told = {name: batch[name] for name in ("segments", "routing_mask")}
    with torch.no_grad(), routed_as(session.model, batch["tasks"], **told):
        first = session.model(input_ids=batch["input_ids"][:, :end], pixel_values=batch["pixel_values"], use_cache=True)
        rest = session.model(input_ids=batch["input_ids"][:, end:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), taught, **CLOSE)


@pytest.mark.parametrize("turns", [(3,), (0, 1)])
def test_padding_is_told_by_the_masks_of_a_static_cache(session: TunedSession, turns: tuple[int, ...]) -> None:
    """Stock generate, without `routed_as`: masks of queries and keys are what the model gets."""
    rows = [conversation(session.recipe, *turns), conversation(session.recipe, 0, 1, 2)]
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}

    def first_logits(rows: list[Any]) -> Tensor:
        inputs, _ = session.collator.routed_prompts(rows)
        out = session.model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        return out.logits[0][0]

    torch.testing.assert_close(first_logits(rows), first_logits(rows[:1]), **CLOSE)


def test_a_mask_that_tells_no_padding_is_refused(session: TunedSession) -> None:
    batch = session.collator([conversation(session.recipe, 0)])
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    with pytest.raises(ValueError, match="does not tell padding"):
        session.model(**inputs, attention_mask=torch.ones(1, 2, 2, 2))


def test_layers_that_do_not_run_keep_their_selection_in_decoding(session: TunedSession) -> None:
    """As cross-attention without an image."""
    expected = session.model.base_model.mixlora_layers
    block = session.model.get_decoder().layers[1]
    block.forward = lambda states, *args, **kwargs: states
    inputs, routing = session.collator.routed_prompts([conversation(session.recipe, 0, 1)])
    with routed_as(session.model, **routing):
        session.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(session.model.base_model.last_selection()) == len(expected)


def test_the_model_inside_is_told_as_the_peft_model_is(session: TunedSession) -> None:
    inputs, routing = session.collator.routed_prompts([conversation(session.recipe, 0, 1)])
    with torch.no_grad():
        with routed_as(session.model, **routing):
            expected = session.model(**inputs).logits
        for model in (session.model.get_base_model(), torch.nn.ModuleList([session.model])):
            with routed_as(model, **routing):
                torch.testing.assert_close(session.model(**inputs).logits, expected)
        assert not torch.allclose(session.model(**inputs).logits, expected)
