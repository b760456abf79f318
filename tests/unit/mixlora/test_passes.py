"""The method in the hands of those who call the model themselves: passes of any part of it, between others, without a
cache or with one of several, with labels of any kind.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from qmixlora.data import IGNORED
from qmixlora.mixlora import MixLoraConfig
from qmixlora.mixlora.running_means import Center
from qmixlora.session import Session

from .helpers import layers, randomize_with_centers

TARGETS = ["q_proj", "v_proj", "down_proj"]
EXACT = {"rtol": 1e-4, "atol": 1e-4}


def text_model(kind: Any = LlamaForCausalLM, task_type: Any = None, **axes: Any) -> Any:
    """A small language model without images, with an adapter away from its initialisation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    adapter = MixLoraConfig(num_factors=8, r=2, task_type=task_type, target_modules=TARGETS, **axes)
    model = get_peft_model(kind(config), adapter)
    randomize_with_centers(model)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return text_model(task_type="CAUSAL_LM")


def ids(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, width), generator=torch.Generator().manual_seed(seed))


def selection(model: Any) -> Tensor:
    chosen: Tensor = model.base_model.last_selection()
    return chosen


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_labels_that_leave_no_prompt_are_refused(route_on: str) -> None:
    model, input_ids = text_model(route_on=route_on), ids(2, 6)
    labels = input_ids.clone()
    labels[0, :3] = IGNORED
    with pytest.raises(ValueError, match="Sample 1 of the batch has no token before its first supervised one"):
        model(input_ids=input_ids, labels=labels)
    mask_BS = torch.ones_like(input_ids, dtype=torch.bool)
    model(input_ids=input_ids, labels=labels, routing_mask=mask_BS)  # who says what the prompt is may learn it


@pytest.mark.parametrize("axes", [{"route_on": "all"}, {"route_on": "task", "tasks": ["a"]}])
def test_what_is_not_routed_on_a_prompt_needs_none(axes: dict[str, Any]) -> None:
    model, input_ids = text_model(**axes), ids(2, 6)
    model(input_ids=input_ids, labels=input_ids, tasks=["a", "a"])


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_labels_of_samples_tell_nothing_of_a_prompt(task_type: str | None) -> None:
    model, input_ids = text_model(LlamaForSequenceClassification, task_type), ids(2, 6)
    model(input_ids=input_ids)
    without = selection(model)
    model(input_ids=input_ids, labels=torch.tensor([0, 1]))
    assert torch.equal(selection(model), without)


def test_embeddings_with_labels_alone_are_routed_on_the_prompt(model: Any) -> None:
    input_ids = ids(2, 6)
    labels = input_ids.clone()
    labels[:, :3] = IGNORED
    embeddings = model.get_input_embeddings()(input_ids)
    model(inputs_embeds=embeddings, labels=labels)
    own = selection(model)
    model(inputs_embeds=torch.cat([embeddings[:, :3], embeddings[:, 3:].flip(0)], dim=1), labels=labels)
    assert torch.equal(selection(model), own)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])  # PEFT generates with another class without a task
@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
@pytest.mark.parametrize("how", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_what_is_generated_is_routed_on_the_prompt_alone(
    how: dict[str, Any], route_on: str, task_type: str | None
) -> None:
    model = text_model(task_type=task_type, route_on=route_on)
    prompt = torch.cat([ids(1, 6), ids(1, 6)], dim=1)  # which there is something to look up in
    told: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(input_ids=prompt, **told)
    assert torch.equal(model.generate(input_ids=prompt, **told, **how), cached)
    embeddings = model.get_input_embeddings()(prompt)
    model(inputs_embeds=embeddings)  # after a generation all of a pass is routed on
    own = selection(model)
    model(inputs_embeds=embeddings[:, :6])
    assert not torch.equal(selection(model), own)


def test_a_prompt_that_is_read_in_chunks_is_refused(model: Any) -> None:
    told: dict[str, Any] = {"input_ids": ids(1, 9), "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(ValueError, match=r"reads 4 of the prompt's 9 tokens.* prefill_chunk_size"):
        model.generate(**told, prefill_chunk_size=4)
    assert torch.equal(model.generate(**told, prefill_chunk_size=9), model.generate(**told))


@pytest.mark.parametrize("call", ["__call__", "generate"])
def test_an_adapter_for_each_sample_is_refused(model: Any, call: str) -> None:
    """As PEFT's LoRA takes them; other tuners' models leave the argument out without a word."""
    with pytest.raises(ValueError, match=r"adapter_names: .* set_adapter"):
        getattr(model, call)(input_ids=ids(2, 6), adapter_names=["default", "__base__"])


def test_caches_in_turn_go_on_with_their_own_factors(model: Any) -> None:
    """Of other lengths, or the same; a copy of a cache goes on as the cache does."""
    prompts, told = [ids(1, width, seed) for width, seed in ((5, 1), (7, 2), (5, 3))], ids(1, 3, 9)
    with torch.no_grad():
        alone = [model(input_ids=torch.cat([prompt, told], dim=1), routing_mask=mask(prompt, 3)) for prompt in prompts]
        caches = [model(input_ids=prompt, use_cache=True).past_key_values for prompt in prompts]
        copies = [copy.deepcopy(cache) for cache in caches]
        for kept in (caches, copies):
            for cache, whole in zip(kept, alone, strict=True):
                behind = model(input_ids=told, past_key_values=cache).logits
                torch.testing.assert_close(behind, whole.logits[:, -3:], **EXACT)


def mask(prompt: Tensor, more: int) -> Tensor:
    """A routing mask of a prompt with as many tokens behind it."""
    return torch.cat([torch.ones_like(prompt), prompt.new_zeros(len(prompt), more)], dim=1).bool()


def test_a_cache_without_a_prefill_by_the_mixture_is_refused(model: Any) -> None:
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=ids(1, 5), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="A cache of 5 tokens without a prefill through this adapter"):
            model(input_ids=ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_a_pass_of_the_model_as_it_is_changes_nothing_of_that_before_it(route_on: str, checkpointing: bool) -> None:
    """As in preference tuning: a pass, the reference's, and the backward pass."""

    def learned(between: bool) -> tuple[dict[str, Tensor], list[float]]:
        model, input_ids = text_model(route_on=route_on, dropout=0.0).train(), ids(4, 6)
        if checkpointing:
            model.gradient_checkpointing_enable()
        labels = input_ids.clone()
        labels[:, :3] = IGNORED
        loss = model(input_ids=input_ids, labels=labels).loss
        if between:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=ids(3, 5), labels=ids(3, 5))
        loss.backward()
        gradients = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
        return gradients, [own.pending_count.item() for own in model.modules() if isinstance(own, Center)]

    (expected, counted), (gradients, counts) = learned(between=False), learned(between=True)
    assert counts == counted and set(counts) == {4.0}
    assert gradients.keys() == expected.keys() and any("mixlora_route" in name for name in gradients)
    for name, own in expected.items():
        assert torch.equal(gradients[name], own), name


def test_passes_without_a_gradient_are_not_counted(model: Any) -> None:
    center = next(own for own in model.modules() if isinstance(own, Center))
    with torch.no_grad():
        model.train().generate(input_ids=ids(3, 5), max_new_tokens=2)
    assert center.pending_count == 0
    model(input_ids=ids(3, 5))
    assert center.pending_count == 3


@pytest.mark.parametrize("route_on", ["embedding", "instruction", "all"])
def test_parts_that_hold_the_decoder_can_be_called_by_themselves(route_on: str) -> None:
    model = text_model(route_on=route_on)
    first, second = ids(2, 6), ids(2, 6, seed=1)
    with torch.no_grad():
        whole = model(input_ids=second, output_hidden_states=True).hidden_states[-1]
        model(input_ids=first)
        body = model.get_base_model().model(input_ids=second)
    torch.testing.assert_close(body.last_hidden_state, whole, **EXACT)


def test_so_can_they_in_a_model_that_sees(session: Session, batch: dict[str, Any]) -> None:
    randomize_with_centers(session.model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    inner = session.model.eval().get_base_model()
    with torch.no_grad():
        whole = session.model(**inputs, output_hidden_states=True).hidden_states[-1]
        session.model(**{name: value.flip(0) for name, value in inputs.items()})
        body = inner.model(**inputs)
        assert len(selection(session.model)[0]) == len(batch["input_ids"])
    torch.testing.assert_close(body.last_hidden_state, whole, **EXACT)


def test_a_layer_by_itself_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="works outside of a pass"):
        layers(model)[0](torch.randn(2, 6, 32))


def test_an_error_in_a_pass_leaves_the_next_whole(model: Any) -> None:
    input_ids = ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        with pytest.raises(IndexError):
            model(input_ids=input_ids + 64)
        assert torch.equal(model(input_ids=input_ids).logits, expected)


def test_replicas_of_a_model_are_refused(model: Any) -> None:
    """As `nn.DataParallel` makes them."""
    replica = model.get_base_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(input_ids=ids(2, 6))


def test_a_model_is_copied_and_pickled_after_passes(model: Any) -> None:
    input_ids = ids(2, 6)
    expected = model(input_ids=input_ids).logits
    expected.sum().backward()
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        with torch.no_grad():
            model(input_ids=ids(3, 4))
            torch.testing.assert_close(other(input_ids=input_ids).logits, expected, **EXACT)
            told: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
            answer = other.generate(input_ids=input_ids, **told)
            other.base_model.mixlora_layers[0].mixlora_B["default"].mul_(5)  # which the first does not know of
            assert torch.equal(model.generate(input_ids=input_ids, **told), answer)


@pytest.mark.parametrize("axes", [{}, {"pairing": "conditional"}, {"route_on": "instruction"}, {"gate": "dense"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_whose_adapters_were_cast_works(axes: dict[str, Any], dtype: torch.dtype) -> None:
    model, input_ids = text_model(**axes), ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        cast = model.to(dtype)(input_ids=input_ids).logits
    assert cast.dtype == dtype
    torch.testing.assert_close(cast.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_of_tokens_in_one_row_go_on_from_a_cache(model: Any, rows: int) -> None:
    """As shared experts do, which get B x S tokens flattened."""
    input_ids = ids(rows, 9)

    def passed() -> Tensor:
        with torch.no_grad():
            first = model(input_ids=input_ids[:, :4], use_cache=True)
            rest = model(input_ids=input_ids[:, 4:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, rest.logits], dim=1)

    expected = passed()
    for block in model.get_decoder().layers:
        block.mlp.forward = lambda x, whole=block.mlp.forward: whole(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(passed(), expected, **EXACT)
