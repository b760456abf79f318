"""Rivals of the mixture, and what is tried of it, compute what they are named for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qmixlora.data import IGNORED
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import routed_as
from tests.e2e.conftest import RealStandIn

from .conftest import Fresh


def test_every_question_of_a_conversation_is_an_instruction_of_its_own(fresh: Fresh) -> None:
    import experiments

    trainer, batch = fresh("random-routing")
    ids_BS, mask_BS, number_BS = batch["input_ids"], batch["routing_mask"], batch["segments"]
    image = trainer.model.config.image_token_id
    expected = [
        ids_S[mask_S & (number_S == number) & (ids_S != image)].tolist()
        for ids_S, mask_S, number_S in zip(ids_BS, mask_BS, number_BS, strict=True)
        for number in range(int(number_S.max()) + 1)
    ]
    trainer.model(**batch)
    routing = trainer.model.base_model.mixlora_routing.current
    assert len(expected) > len(ids_BS)
    assert [ids.tolist() for ids in experiments.instructions(routing, ids_BS)] == expected
    selection = trainer.model.base_model.last_selection()
    trainer.model(**batch)
    assert torch.equal(trainer.model.base_model.last_selection(), selection)


@pytest.mark.parametrize("name", ["word-dropout", "condition-dropout-0.2", "condition-noise-0.5"])
def test_conditions_are_disturbed_in_training_alone(fresh: Fresh, name: str) -> None:
    trainer, batch = fresh(name)

    def conditions() -> torch.Tensor:
        with torch.no_grad():
            trainer.model(**batch)
        condition: torch.Tensor = trainer.model.base_model.mixlora_routing.current.cache.conditions["default"]
        return condition

    trainer.model.eval()
    calm = conditions()
    assert torch.equal(conditions(), calm)
    trainer.model.train()
    assert not torch.equal(conditions(), conditions()) and conditions().shape == calm.shape


MIXTURES = (
    "pairing=shared_a", "shared=4", "states-0.5-embedding", "states-0.5-uniform", "router=model", "random-routing",
    "question-ahead-4",
)  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_generated_from_the_cache_has_the_logits_of_a_whole_pass(
    comparison: Any, real_standin: RealStandIn, fresh: Fresh, name: str
) -> None:
    from qmixlora.data import Collator, load_conversations

    trainer, _ = fresh(name)
    model, collator = trainer.model.eval(), trainer.data_collator.collator
    rows = load_conversations(str(real_standin.data / "conversations.json"))
    inputs, routing = Collator.routed_prompts(collator, [rows[0], rows[1]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode(), routed_as(model, **routing):
        cached = model.generate(**inputs, **options)
        whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-3, rtol=1e-3)


def selections(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The mixing matrices of every layer (L x N x ...), and their gradients reach what is trained."""
    supervised_loss(trainer.model, batch).backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    matrices: torch.Tensor = trainer.model.base_model.last_selection()
    return matrices


def test_experts_that_share_a_are_weighted_by_a_softmax(fresh: Fresh) -> None:
    trainer, batch = fresh("pairing=shared_a")
    mix_LNRE = selections(trainer, batch)
    mix_LNRKR = mix_LNRE.unflatten(3, (4, 4))
    gate_LNK = mix_LNRKR.diagonal(dim1=2, dim2=4)[..., 0]
    torch.testing.assert_close(gate_LNK.sum(dim=2), torch.ones(gate_LNK.shape[:2]))
    torch.testing.assert_close(mix_LNRKR, torch.einsum("lnk,ij->lnikj", gate_LNK, torch.eye(4)))
    layer = trainer.model.base_model.mixlora_layers[0]
    assert layer.mixlora_A["default"].shape == (4, 64) and layer.mixlora_B["default"].shape == (16, 64)


def test_factors_that_are_always_on_weigh_one_beside_the_routed(fresh: Fresh) -> None:
    trainer, batch = fresh("shared=4")
    gate_LNE = selections(trainer, batch).diagonal(dim1=2, dim2=3)
    assert (gate_LNE[..., :4] == 1).all()
    assert ((gate_LNE[..., 4:] > 0).sum(dim=2) == 4).all()
    torch.testing.assert_close(gate_LNE[..., 4:].sum(dim=2), torch.full(gate_LNE.shape[:2], 4.0))


@pytest.mark.parametrize("below", ["embedding", "uniform"])
def test_layers_above_a_block_are_routed_on_the_questions_states_there(fresh: Fresh, below: str) -> None:
    trainer, batch = fresh(f"states-0.5-{below}")
    own, _ = fresh("mixlora")
    other_image = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    first_LNEF, second_LNEF = selections(trainer, batch), selections(trainer, other_image)
    lower, upper = slice(0, 7), slice(7, 14)
    assert torch.equal(first_LNEF[lower], second_LNEF[lower])
    assert not torch.equal(first_LNEF[upper], second_LNEF[upper])
    if below == "embedding":
        torch.testing.assert_close(first_LNEF[lower], selections(own, batch)[lower])
    else:
        torch.testing.assert_close(first_LNEF[lower], torch.eye(16).expand(first_LNEF[lower].shape))


def test_the_size_of_a_tokens_state_does_not_move_the_routing_on_states(fresh: Fresh) -> None:
    """That of the first token of a real model is a hundred times as large as others."""
    trainer, batch = fresh("states-0.5-embedding")
    before_LNEF = selections(trainer, batch)

    def enlarge(module: torch.nn.Module, args: Any, output: Any) -> Any:
        (output if isinstance(output, torch.Tensor) else output[0])[:, 0].mul_(100)

    block = trainer.model.base_model.model.get_submodule("model.language_model.layers.0")
    block.register_forward_hook(enlarge, prepend=True)
    with torch.no_grad():
        trainer.model(**batch)
    torch.testing.assert_close(trainer.model.base_model.last_selection(), before_LNEF, atol=1e-3, rtol=1e-3)


def test_questions_that_are_read_ahead_are_read_alone_by_the_first_frozen_blocks(fresh: Fresh) -> None:
    import rivals

    trainer, batch = fresh("mixlora")
    rivals.question_read_ahead(1)(trainer)
    model, (first, second) = trainer.model, trainer.model.base_model.model.get_decoder().layers

    def conditions(**changed: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model(**batch | changed)
        condition_ND: torch.Tensor = model.base_model.mixlora_routing.current.cache.conditions["default"]
        return condition_ND

    condition_ND = conditions()
    words_BS = batch["input_ids"].roll(1, dims=0).where(batch["routing_mask"], batch["input_ids"])
    assert not torch.allclose(conditions(input_ids=words_BS), condition_ND)
    assert torch.equal(conditions(pixel_values=batch["pixel_values"].flip(0)), condition_ND)
    alone_ND = conditions(**{name: values[-1:] for name, values in batch.items()})
    torch.testing.assert_close(alone_ND, condition_ND[-1:], atol=1e-4, rtol=1e-4)
    selections(trainer, batch)  # the model is whole: all that is trained learns
    with torch.no_grad():
        for layer in model.base_model.mixlora_layers:
            layer.mixlora_B["default"].mul_(2)
        second.input_layernorm.weight.mul_(2)
    assert torch.equal(conditions(), condition_ND)
    with torch.no_grad():
        first.post_attention_layernorm.weight.mul_(2)
    assert not torch.allclose(conditions(), condition_ND)


def test_questions_that_are_read_ahead_are_white(fresh: Fresh) -> None:
    trainer, _ = fresh("question-ahead-4")
    rows, context = trainer.train_dataset, trainer.model.base_model.mixlora_routing
    pictured = [row for row in rows if "pixels" in row]
    parts = []
    with torch.no_grad():
        for start in range(0, len(pictured), 16):
            trainer.model(**trainer.data_collator(pictured[start : start + 16]))
            parts.append(context.current.cache.conditions["default"])
    condition_ND = torch.cat(parts)
    size_D = torch.linalg.svdvals(condition_ND - condition_ND.mean(dim=0))
    assert size_D[0] < 1.5 * size_D[4]


def test_every_answer_is_learned_by_the_lora_of_its_task_and_by_no_other(comparison: Any) -> None:
    from comparison import Run, fresh_session
    from prepared import tasks_of, with_answers_of

    _, rows = fresh_session(comparison, Run("lora-r4", comparison.methods["lora-r4"], 1e-3, 0))

    def supervised(some: list[dict[str, Any]]) -> int:
        return sum(int((row["labels"] != IGNORED).sum()) for row in some)

    by_task = {task: with_answers_of(rows, task) for task in tasks_of(rows)}
    assert len(by_task) == 15 and all(map(supervised, by_task.values()))
    assert sum(map(len, by_task.values())) > len(rows)
    assert sum(map(supervised, by_task.values())) == supervised(rows)


def test_loras_of_tasks_answer_their_own_and_none_that_is_new(few_tasks: Any) -> None:
    """In what real.py computes in, too: a projector in bfloat16 is trained in fp32."""
    import real
    from comparison import Run, execute

    as_real = dataclasses.replace(few_tasks, overrides=(*real.ON_SMOLLM2.overrides, *few_tasks.overrides))
    result = execute(as_real, Run("lora-per-task", as_real.methods["lora-per-task"], 1e-3, 0))
    assert "held_out" not in result and "conversations" in result
    assert result["test"].keys() == {"mean", "caption", "digit", "text"}
    assert result["trainable_parameters"] % 3 == 0


def test_arrow_sends_tokens_to_the_loras_that_answer_most_to_them(few_tasks: Any) -> None:
    from comparison import Run, score, trained
    from peft.tuners.lora.bnb import Linear4bit

    run = Run("arrow", few_tasks.methods["arrow"], 1e-3, 0)
    session = trained(few_tasks, run).session
    torch.manual_seed(0)
    for name, parameter in session.model.named_parameters():
        if ".lora_" in name:  # whose largest singular value stands apart
            torch.nn.init.normal_(parameter, std=0.1)
            (parameter[:1] if ".lora_A." in name else parameter[:, :1]).data.mul_(10)
    layers = {name: module for name, module in session.model.named_modules() if hasattr(module, "lora_arrow")}
    assert len(layers) == 14 and all(isinstance(module, Linear4bit) for module in layers.values())
    assert not any("vision" in name for name in layers) and session.model.active_adapter == "arrow_router"
    layer = next(iter(layers.values()))
    x_BSI = torch.randn(2, 3, layer.in_features)
    names = [name for name in layer.lora_A if name != "arrow_router"]
    assert names == ["caption", "digit", "text"]
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
    leading_TI = torch.stack([torch.linalg.svd(b @ a).Vh[0] for a, b in pairs])
    score_BST = (x_BSI @ leading_TI.T).abs()
    gate_BST = score_BST.softmax(dim=-1)  # of all three, which are as many as Arrow takes
    each_BSTO = torch.stack([2 * x_BSI @ a.T @ b.T for a, b in pairs], dim=2)
    expected = layer.base_layer(x_BSI) + (gate_BST[..., None] * each_BSTO).sum(dim=2)
    torch.testing.assert_close(layer(x_BSI), expected, atol=1e-4, rtol=1e-3)
    answered = score(few_tasks, run, session, "held_out", float("inf"))
    assert answered is not None and len(answered) == 7  # tasks that no LoRA was trained for, and their mean
