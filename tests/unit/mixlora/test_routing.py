"""What must hold of routing whatever the batch: hypothesis draws the batches."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from qmixlora.mixlora import MixLoraConfig
from qmixlora.mixlora.routing import OptimizerSteps
from qmixlora.mixlora.running_means import update_means
from qmixlora.mixlora.selection import conditional_scores, select

PAIRINGS, GATES = ("conditional", "tied"), ("hard", "straight_through", "weighted")
ROUTES = ("instruction", "embedding")
IMAGE, PAD = 3, 0


class Decoder(nn.Module):
    """Embeddings and one linear layer, with the names that transformers models have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.config = type("Config", (), {})()
        self.config.image_token_id = IMAGE

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.linear(self.embed(input_ids))


def adapted(route_on: str, pairing: str = "conditional", gate: str = "weighted") -> PeftModel:
    config = MixLoraConfig(
        num_factors=6, r=2, pairing=pairing, gate=gate, route_on=route_on, target_modules=["linear"], dropout=0.0
    )
    model = get_peft_model(Decoder(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


MODELS = {route_on: adapted(route_on) for route_on in ROUTES}
samples = st.lists(
    st.tuples(
        st.lists(st.integers(3, 19), min_size=1, max_size=6),  # prompt, image tokens among it
        st.lists(st.integers(4, 19), min_size=1, max_size=4),  # answer
    ),
    min_size=1,
    max_size=5,
)


def collate(rows: list[tuple[list[int], list[int]]], extra: int = 0, left: bool = False) -> dict[str, Tensor]:
    width = max(len(p) + len(a) for p, a in rows) + extra
    batch = {
        k: torch.full((len(rows), width), v) for k, v in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100))
    }
    for index, (prompt, answer) in enumerate(rows):
        start = width - len(prompt) - len(answer) if left else 0
        end = start + len(prompt) + len(answer)
        batch["input_ids"][index, start:end] = torch.tensor(prompt + answer)
        batch["attention_mask"][index, start:end] = 1
        batch["labels"][index, start + len(prompt) : end] = torch.tensor(answer)
    return batch


def mixes(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        model(**batch)
    (mix,) = model.base_model.mixlora_routing.current.cache.mixing_matrices.values()
    return mix


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(ROUTES), st.integers(1, 5), st.booleans())
def test_padding_changes_no_selection(rows: list, route_on: str, extra: int, left: bool) -> None:
    model = MODELS[route_on]
    torch.testing.assert_close(mixes(model, collate(rows)), mixes(model, collate(rows, extra, left)))


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(ROUTES), st.data())
def test_the_answer_changes_no_selection(rows: list, route_on: str, data: st.DataObject) -> None:
    answer = st.lists(st.integers(4, 19), min_size=1, max_size=4)
    others = [(prompt, data.draw(answer)) for prompt, _ in rows]
    model = MODELS[route_on]
    torch.testing.assert_close(mixes(model, collate(rows)), mixes(model, collate(others)))


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(ROUTES))
def test_neighbours_change_no_selection(rows: list, route_on: str) -> None:
    model = MODELS[route_on]
    alone = torch.cat([mixes(model, collate([row])) for row in rows])
    torch.testing.assert_close(mixes(model, collate(rows)), alone)


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(ROUTES), st.randoms())
def test_permuting_a_batch_permutes_its_output(rows: list, route_on: str, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    model, batch = MODELS[route_on], collate(rows)
    with torch.no_grad():
        output, permuted = model(**batch), model(**{k: v[order] for k, v in batch.items()})
    torch.testing.assert_close(permuted, output[order])


@settings(max_examples=40, deadline=None)
@given(samples)
def test_images_do_not_count_for_the_instruction(rows: list) -> None:
    with_image = [([IMAGE, IMAGE, *prompt], answer) for prompt, answer in rows]
    texts = [([token for token in prompt if token != IMAGE] or prompt, answer) for prompt, answer in rows]
    model = MODELS["instruction"]
    if all(any(token != IMAGE for token in prompt) for prompt, _ in rows):
        torch.testing.assert_close(mixes(model, collate(with_image)), mixes(model, collate(texts)))


@pytest.mark.parametrize(("pairing", "gate"), list(itertools.product(PAIRINGS, GATES)))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), r=st.integers(2, 5), factors=st.integers(5, 9))
def test_each_sample_selects_r_distinct_factors(pairing: str, gate: str, seed: int, r: int, factors: int) -> None:
    torch.manual_seed(seed)
    config = MixLoraConfig(num_factors=factors, r=r, pairing=pairing, gate=gate)
    conditional = None
    if pairing == "conditional":
        conditional = partial(conditional_scores, pool_EI=torch.randn(factors, 4), route_RIE=torch.randn(r, 4, factors))
    mix = select(config, torch.randn(3, factors), None if pairing == "tied" else torch.randn(3, factors), conditional)
    used = mix != 0
    assert (used.sum(dim=(1, 2)) == r).all()
    assert (used.sum(dim=1) <= 1).all() and (used.sum(dim=2) <= 1).all()
    if gate != "weighted" or pairing == "tied":
        torch.testing.assert_close(mix.sum(dim=(1, 2)), torch.full((3,), float(r)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 99))
def test_task_means_are_exact_while_the_window_lasts(batches: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    mean, count = torch.zeros(3, 2, 2), torch.zeros(3)
    everything: list[tuple[int, Tensor]] = []
    for tasks in batches:
        mix = torch.randn(len(tasks), 2, 2)
        update_means(mean, count, mix, torch.tensor(tasks))
        everything += zip(tasks, mix, strict=True)
    for task in range(3):
        own = [m for t, m in everything if t == task]
        assert count[task] == len(own)
        expected = torch.stack(own).mean(dim=0) if own else torch.zeros(2, 2)
        torch.testing.assert_close(mean[task], expected, rtol=1e-4, atol=1e-5)


def trained(value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value]))
    parameter.square().sum().backward()
    return parameter


def test_a_batch_is_of_the_same_step_while_gradients_wait() -> None:
    steps, parameter = OptimizerSteps(), trained(2.0)
    steps.have_gone_on(parameter)
    assert not steps.have_gone_on(parameter)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_of_the_optimiser_is_noticed(set_to_none: bool) -> None:
    steps, parameter = OptimizerSteps(), trained(2.0)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    steps.have_gone_on(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert steps.have_gone_on(parameter)


def test_the_batch_after_a_steps_first_one_is_of_that_step() -> None:
    """Gradients are kept as zeros, so that the values alone tell of the step."""
    steps, parameter = OptimizerSteps(), trained(2.0)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert steps.have_gone_on(parameter)
    assert not steps.have_gone_on(parameter)


def test_gradients_that_are_cleared_between_micro_batches_look_like_steps() -> None:
    steps, parameter = OptimizerSteps(), trained(2.0)
    steps.have_gone_on(parameter)
    parameter.grad = None
    assert steps.have_gone_on(parameter)


def test_every_batch_is_a_step_where_no_gradient_reaches_the_tensor() -> None:
    steps, parameter = OptimizerSteps(), nn.Parameter(torch.ones(1))
    assert [steps.have_gone_on(parameter) for _ in range(3)] == [True] * 3


def test_every_batch_is_a_step_where_nothing_learns() -> None:
    steps = OptimizerSteps()
    assert [steps.have_gone_on(None) for _ in range(3)] == [True] * 3
