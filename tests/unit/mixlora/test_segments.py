"""Each question of a conversation with its answer is one instance, in training and in generation alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import layer_norm

from qmixlora.data import IGNORED
from qmixlora.evaluation import generate_answers
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig, routed_as
from qmixlora.mixlora.routing_record import RoutingStatistics
from qmixlora.mixlora.running_means import Center
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

from .conversations import (
    ANSWERS,
    TASKS,
    conversation,
    logits_by_hand,
    logits_of,
    mixed_rows,
    opened,
    padded_left,
)
from .helpers import layers

Make = Callable[..., Recipe]
PAIRINGS, GATES = ("conditional", "released", "independent", "tied"), ("hard", "straight_through", "weighted", "dense")
ROUTES = ("prompt", "instruction", "embedding", "task")
AXES = [
    *itertools.product(PAIRINGS, GATES, ["embedding"]),
    *itertools.product(["tied"], ["weighted"], ["all", "prompt", "instruction", "task"]),
    *itertools.product(["conditional"], ["straight_through"], ["all", "prompt", "instruction", "task"]),
]
every_route = pytest.mark.parametrize("route_on", ROUTES)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # fp32 sums in another order, layer after layer; other gates are off by 0.03


@pytest.fixture
def session(make_recipe: Make) -> TunedSession:
    return opened(make_recipe)


@pytest.mark.parametrize(("pairing", "gate", "route_on"), AXES)
def test_every_segment_is_routed_as_the_slow_reference_does(
    make_recipe: Make, pairing: str, gate: str, route_on: str
) -> None:
    session = opened(make_recipe, pairing=pairing, gate=gate, route_on=route_on)
    batch = session.collator(mixed_rows(session.recipe))
    for padded in (batch, padded_left(batch)):
        real_BS = padded["attention_mask"].bool()
        own, expected = logits_of(session.model, padded), logits_by_hand(session, padded)
        torch.testing.assert_close(own[real_BS], expected[real_BS], **CLOSE)


def test_segments_of_one_sample_are_routed_apart(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    first, second, third, *_ = session.model.base_model.last_selection()[0]
    assert not torch.allclose(first, second) and not torch.allclose(second, third)


@every_route
def test_neighbours_and_padding_change_no_answer(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    rows = mixed_rows(session.recipe)
    batch = session.collator(rows)
    together = logits_of(session.model, batch)
    for index, row in enumerate(rows):
        alone = logits_of(session.model, session.collator([row]))
        torch.testing.assert_close(together[index : index + 1, : alone.shape[1]], alone, **CLOSE)


def answers_taught(session: TunedSession, rows: list[Any]) -> list[list[Tensor]]:
    """Of every sample and answer, the logits that its tokens are learned by."""
    batch = session.collator(rows)
    logits_BSV, made = logits_of(session.model, batch), []
    for labels_S, segments_S, logits_SV in zip(batch["labels"], batch["segments"], logits_BSV, strict=True):
        numbers = range(int(segments_S.max()) + 1)
        at = [((labels_S != IGNORED) & (segments_S == number)).nonzero()[:, 0] - 1 for number in numbers]
        made.append([logits_SV[positions] for positions in at])
    return made


def up_to(row: Any, answer: int) -> Any:
    """A conversation up to one of its answers."""
    return {**row, "turns": row["turns"][: 2 * answer + 2], "tasks": row.get("tasks", [])[: answer + 1]}


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


def test_a_stock_forward_takes_the_whole_prompt_as_one_segment(session: TunedSession) -> None:
    inputs, routing = session.collator.routed_prompts(mixed_rows(session.recipe))
    stock = logits_of(session.model, inputs)
    assert session.model.base_model.last_selection().shape[1] == 3
    with routed_as(session.model, segments=inputs["attention_mask"] - 1, routing_mask=inputs["attention_mask"]):
        assert torch.equal(logits_of(session.model, inputs), stock)
    with routed_as(session.model, **routing):
        assert not torch.allclose(logits_of(session.model, inputs), stock)


@pytest.mark.parametrize("route_on", [*ROUTES, "all"])
def test_samples_of_one_segment_take_the_path_without_segments(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    batch = session.collator([conversation(session.recipe, 0), conversation(session.recipe, 3)])
    without = {name: value for name, value in batch.items() if name != "segments"}
    assert torch.equal(logits_of(session.model, batch), logits_of(session.model, without))
    assert session.model.base_model.mixlora_routing.current.segments is None


def test_to_a_router_on_all_positions_a_whole_sample_is_one_instance(make_recipe: Make) -> None:
    session = opened(make_recipe, route_on="all", pairing="conditional", condition_norm="none")
    batch = session.collator(mixed_rows(session.recipe))
    without = {name: value for name, value in batch.items() if name != "segments"}
    assert torch.equal(logits_of(session.model, batch), logits_of(session.model, without))
    assert session.model.base_model.last_selection().shape[1] == 3
    assert session.model.base_model.last_labels(batch["tasks"]) == ["color", "digit", "digit"]


@pytest.mark.parametrize("pairing", ["tied", "conditional"])
@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_recomputing_a_layer_gives_the_same_gradients(
    make_recipe: Make, route_on: str, pairing: str, tmp_path: Path
) -> None:
    gradients = []
    for enabled in (False, True):
        train = {"checkpointing": {"enabled": enabled}}
        session = opened(make_recipe, train, route_on=route_on, pairing=pairing)
        make_trainer(session, [], None, tmp_path, ProgressDisplay(Console(quiet=True)))  # type: ignore[arg-type]
        session.model.train()
        supervised_loss(session.model, session.collator(mixed_rows(session.recipe))).backward()
        gradients.append({n: p.grad for n, p in session.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("route" in name and gradient.any() for name, gradient in gradients[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradients_are_those_of_the_segments_one_by_one(session: TunedSession) -> None:
    """The loss of a conversation is that of its answers, each behind its own history."""
    row, model = mixed_rows(session.recipe)[0], session.model
    whole, apart = session.collator([row]), [session.collator([up_to(row, answer)]) for answer in range(3)]
    supervised_loss(model, whole, 1).backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for answer, batch in enumerate(apart):
        batch["labels"][batch["segments"] != answer] = IGNORED
        supervised_loss(model, batch, 1).backward()
    for name, parameter in model.named_parameters():
        if name in own:
            atol = 1e-5 * max(1.0, float(own[name].abs().max()))
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_the_centre_counts_segments(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    center = next(module for module in session.model.modules() if isinstance(module, Center))
    given: list[Tensor] = []
    center.register_forward_hook(lambda module, args, output: given.append(args[0]))
    logits_of(session.model.train(), session.collator(mixed_rows(session.recipe)))
    assert len(given[0]) == 6 and center.pending_count.item() == 6
    torch.testing.assert_close(center.pending[0], layer_norm(given[0], given[0].shape[-1:]).sum(dim=0))


def test_statistics_count_segments_for_their_own_tasks(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    assert batch["tasks"] == [["color", "digit", "color"], "digit", "digit"]
    statistics = RoutingStatistics(session.model, TASKS)
    logits_of(session.model, batch)
    selection_LNEF = session.model.base_model.last_selection()
    statistics.add(batch["tasks"])
    means, count_T = statistics.take()
    assert count_T.tolist() == [4, 2]  # digit, color
    for mean_TEF, own_NEF in zip(means.values(), selection_LNEF, strict=True):
        torch.testing.assert_close(mean_TEF[1], own_NEF[[0, 2]].mean(dim=0))
        torch.testing.assert_close(mean_TEF[0], own_NEF[[1, 3, 4, 5]].mean(dim=0))


def test_task_mix_replaces_the_gates_of_segments(make_recipe: Make) -> None:
    session = opened(make_recipe, task_mix=1.0)
    model, layer = session.model.train(), layers(session.model)[0]
    batch = session.collator(mixed_rows(session.recipe))
    logits_of(model, batch)
    own_NEF = model.base_model.last_selection()[0]
    known = model.peft_config["default"].tasks
    for task, places in (("color", [0, 2]), ("digit", [1, 3, 4, 5])):
        mean = layer.mixlora_task_mean["default"][known.index(task)]
        torch.testing.assert_close(mean, own_NEF[places].mean(dim=0))
    assert layer.mixlora_task_count["default"].sum() == 6
    logits_of(model, batch)
    assert model.base_model.mixlora_routing.current.replaced["default"].tolist() == [True] * 6


def test_one_label_of_a_sample_is_that_of_all_its_segments(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    labels = session.model.base_model.last_labels(["a", "b", ["c", "d"]])
    assert labels == ["a", "a", "a", "b", "c", "d"]


def test_too_few_labels_of_a_sample_are_refused(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    with pytest.raises(ValueError, match="2 task labels for a sample of 3 segments"):
        session.model.base_model.last_labels([["a", "b"], "b", "c"])


def test_segments_with_a_gap_are_refused(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    batch["segments"][0][batch["segments"][0] == 1] = 0
    with pytest.raises(ValueError, match="numbered one after the other"):
        logits_of(session.model, batch)


def test_segments_of_another_batch_are_refused(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    with pytest.raises(ValueError, match="2 samples for a batch of 3"):
        logits_of(session.model, {**batch, "segments": batch["segments"][:2]})


def test_layers_outside_the_sequence_take_no_segments(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    model = session.model.unload()
    from peft import get_peft_model

    adapted = get_peft_model(model, MixLoraConfig(target_modules=["fc1"], route_on="embedding"))
    with pytest.raises(ValueError, match=r"segments need layer inputs laid out \(batch, sequence\)"):
        logits_of(adapted, batch)


def test_questions_are_found_by_labels_and_segments_alone(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    expected = logits_of(session.model, batch)
    with torch.no_grad():
        made = session.model(**{name: value for name, value in batch.items() if name != "routing_mask"}).logits
    assert torch.equal(made, expected) and len(ANSWERS) == 4
