"""The training step and the run: loss, checkpointing, accumulation, guard, resume."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.evaluation import generate_answers
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from qmixlora.training import SupervisedTrainer, make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay

QUIET = Console(file=io.StringIO())


def rows_of(data: Path, count: int) -> list[dict[str, Any]]:
    conversations = load_conversations(str(data / "train.json"))
    return [conversations[i] for i in range(count)]


def warm(session: Session) -> None:
    """Away from B = 0, so that every tensor has a gradient."""
    torch.manual_seed(2)
    for name, parameter in session.model.named_parameters():
        if "mixlora_B" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def gradients(session: Session, batch: dict[str, Any]) -> dict[str, Tensor]:
    session.model.zero_grad()
    supervised_loss(session.model, batch).backward()
    return {n: p.grad.clone() for n, p in session.model.named_parameters() if p.requires_grad and p.grad is not None}


def test_the_loss_of_supervised_tokens_is_the_loss_of_all(make_recipe: Callable[..., Recipe], data: Path) -> None:
    session = open_session(make_recipe(), [])
    batch = session.collator(rows_of(data, 5))
    seen = []
    session.model.get_base_model().lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    loss = supervised_loss(session.model, batch)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert [rows * tokens for rows, tokens, _ in seen] == [5, supervised]  # and no other position reaches lm_head
    logits = session.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)


def test_a_loss_in_chunks_is_the_same_and_never_has_all_logits(make_recipe: Callable[..., Recipe], data: Path) -> None:
    session = open_session(make_recipe(), [])
    warm(session)
    session.model.eval()  # in training, the centre of the conditions moves from step to step
    batch = session.collator(rows_of(data, 5))
    whole = gradients(session, batch)
    expected = supervised_loss(session.model, batch).detach()
    seen = []
    session.model.get_base_model().lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    session.model.zero_grad()
    loss = supervised_loss(session.model, batch, chunk=4)
    torch.testing.assert_close(loss.detach(), expected)
    forward = list(seen)
    loss.backward()
    assert max(forward) == 4 and seen[len(forward) :] == forward[1:][::-1]  # computed again, in the backward pass
    for name, parameter in session.model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name])


def test_batches_wait_for_their_turn_in_host_memory(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    trainer = make_trainer(session, rows_of(data, 2), None, tmp_path / "x", ProgressDisplay(QUIET))
    assert trainer.get_train_dataloader().device is None  # accelerate's own loaders send every batch to theirs


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_what_a_family_adds_to_its_head_is_kept(family: str) -> None:
    """Gemma caps its logits softly, after lm_head."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "final_logit_softcapping": 0.1,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    ids = torch.randint(5, 200, (2, 9))
    labels = torch.where(torch.arange(9) < 5, -100, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if family == "gemma4":
        inputs["mm_token_type_ids"] = inputs.pop("token_type_ids")
    logits = model(**inputs).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(supervised_loss(model, {**inputs, "labels": labels}, chunk=3), expected)


def test_a_batch_without_supervision_is_refused(make_recipe: Callable[..., Recipe], data: Path) -> None:
    session = open_session(make_recipe(), [])
    batch = session.collator(rows_of(data, 2))
    batch["labels"].fill_(-100)
    with pytest.raises(UserError, match="no supervised token"):
        supervised_loss(session.model, batch)


@pytest.mark.parametrize(("every_n_layers", "offload"), [(1, False), (2, False), (1, True)])
def test_gradients_are_the_same_with_and_without_checkpointing(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, every_n_layers: int, offload: bool
) -> None:
    tasks = ["color", "count", "digit", "entailment"]
    recipes = [
        make_recipe(
            adapter={"pairing": "conditional", "task_mix": 0.5, "dropout": 0.1, "num_factors": 5, "r": 2},
            train={"checkpointing": {"enabled": on, "every_n_layers": every_n_layers, "offload": on and offload}},
        )
        for on in (True, False)
    ]
    found = []
    for recipe in recipes:
        session = open_session(recipe, tasks)
        warm(session)
        make_trainer(session, [], None, tmp_path / "x", ProgressDisplay(QUIET))
        session.model.train()
        batch = session.collator(rows_of(data, 4))
        for seed in (0, 1):  # the second batch reads the task means that the first one left
            torch.manual_seed(seed)
            grads = gradients(session, batch)
        buffers = {n: b for n, b in session.model.named_buffers() if "mixlora_task" in n}
        found.append((grads, buffers))
    assert found[0][0].keys() == found[1][0].keys()
    for (name, own), other in zip(found[0][0].items(), found[1][0].values(), strict=True):
        assert own.abs().sum() > 0, name
        torch.testing.assert_close(own, other)
    for own, other in zip(found[0][1].values(), found[1][1].values(), strict=True):
        torch.testing.assert_close(own, other)  # a recomputation is not counted twice


def test_checkpointing_recomputes_the_decoder_and_leaves_the_vision_tower_alone(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    make_trainer(session, [], None, tmp_path / "x", ProgressDisplay(QUIET))
    session.model.train()
    calls, needs_grad = [], []
    base = session.model.get_base_model().model
    base.language_model.layers[0].input_layernorm.register_forward_pre_hook(lambda *a: calls.append(1))
    base.vision_tower.register_forward_hook(lambda m, a, out: needs_grad.append(out[0].requires_grad))
    supervised_loss(session.model, session.collator(rows_of(data, 2))).backward()
    assert len(calls) == 2
    assert needs_grad == [False]


def test_one_step_leaves_the_nf4_bytes_and_trains_every_trainable_tensor(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(adapter={"pairing": "conditional"}), [])

    def frozen() -> dict[str, str]:
        return {
            n: hashlib.sha256(p.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
            for n, p in session.model.named_parameters()
            if not p.requires_grad
        }

    before, trained = frozen(), {n: p.clone() for n, p in session.model.named_parameters() if p.requires_grad}
    trainer = make_trainer(
        session, load_conversations(str(data / "train.json")), None, tmp_path / "run", ProgressDisplay(QUIET)
    )
    trainer.train()
    assert frozen() == before
    same = [n for n, p in session.model.named_parameters() if p.requires_grad and torch.equal(p, trained[n])]
    assert not same


def test_evaluating_between_steps_keeps_the_graph(make_recipe: Callable[..., Recipe], data: Path) -> None:
    """bitsandbytes would repack CPU weights in eval mode and lose every gradient below them."""
    session = open_session(make_recipe(adapter={"condition_norm": "none"}), [])  # a centre would move
    warm(session)
    rows = rows_of(data, 2)
    batch = session.collator(rows)
    session.model.train()
    before = gradients(session, batch)
    session.model.eval()
    generate_answers(session.model, session.collator, rows, 2)
    session.model.train()
    after = gradients(session, batch)
    assert before.keys() == after.keys()
    for name, grad in before.items():
        torch.testing.assert_close(grad, after[name])
    assert all(
        not m.weight.quant_state.packing_format_for_cpu
        for m in session.model.modules()
        if isinstance(m, bnb.nn.Linear4bit) and hasattr(m.weight.quant_state, "packing_format_for_cpu")
    )


def test_eight_times_one_accumulated_is_one_times_eight(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    """Answers differ in length, so a mean of per-batch means would be wrong."""
    results = []
    for size, steps in ((8, 1), (1, 8)):
        spec = {"micro_batch_size": size, "gradient_accumulation": steps, "max_steps": 3}
        recipe = make_recipe(train={**spec, "output": str(tmp_path / f"run{size}")})
        folder = train(recipe, console=QUIET)
        results.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    "adapter", [{"task_mix": 0.5, "dropout": 0.1}, {"route_on": "task"}, {"method": "lora", "dropout": 0.1}]
)
def test_resuming_equals_a_straight_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    spec = {"max_steps": 6, "save_every": 3, "gradient_accumulation": 2, "micro_batch_size": 2}
    straight = train(make_recipe(adapter=adapter, train={**spec, "output": str(tmp_path / "a")}), console=QUIET)
    resumed = tmp_path / "b"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-6")
    (resumed / "checkpoints" / "checkpoint-5").mkdir()  # a crash in the middle of saving
    train(make_recipe(adapter=adapter, train={**spec, "output": str(resumed)}), resume=True, console=QUIET)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adam_keeps_its_state_in_8_bits(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path, name: str
) -> None:
    recipe = make_recipe(adapter={"num_factors": 32, "pairing": "conditional"}, train={"optimizer": name})
    session = open_session(recipe, [])
    rows = load_conversations(str(data / "train.json"))
    trainer = make_trainer(session, rows, None, tmp_path, ProgressDisplay(QUIET))
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # under accelerate's wrapper
    assert isinstance(optimizer, bnb.optim.AdamW) and optimizer.is_paged is name.startswith("paged")
    moments = [(p, state["state1"]) for p, state in optimizer.state.items()]
    large = [m for p, m in moments if p.numel() >= 4096]
    assert large and all(m.dtype == torch.uint8 for m in large)


def test_a_run_is_never_overwritten(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    folder = Path(recipe.train.output)
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        train(recipe, console=QUIET)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(recipe, resume=True, console=QUIET)


def test_metrics_and_evaluation_during_training(make_recipe: Callable[..., Recipe], data: Path) -> None:
    recipe = make_recipe(data={"validation": str(data / "validation.json")}, train={"eval_every": 2})
    screen = io.StringIO()
    folder = train(recipe, console=Console(file=screen, width=120))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    assert all({"seconds", "memory_gib"} <= r.keys() for r in records)
    for word in ("step", "loss", "lr", "samples/s", "GiB", "left", "validation loss"):
        assert word in screen.getvalue()


def test_the_guard_stops_a_tensor_without_gradient(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    extra = torch.nn.Parameter(torch.zeros(3))
    session.model.base_model.model.model.language_model.layers[0].self_attn.q_proj.mixlora_A["unused"] = extra
    trainer = make_trainer(
        session, load_conversations(str(data / "train.json")), None, tmp_path, ProgressDisplay(QUIET)
    )
    with pytest.raises(UserError, match=r"1 of the trainable tensors had no gradient in the first 3 steps"):
        trainer.train()


def test_the_guard_stops_what_the_recipe_does_not_declare(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    rows = load_conversations(str(data / "train.json"))

    def run(break_it: Callable[[Session], None]) -> SupervisedTrainer:
        session = open_session(make_recipe(), [])
        break_it(session)
        return make_trainer(session, rows, None, tmp_path, ProgressDisplay(QUIET)).train()

    def train_head(session: Session) -> None:
        session.model.get_base_model().lm_head.weight.requires_grad_(True)

    def train_in_bf16(session: Session) -> None:
        for name, parameter in session.model.named_parameters():
            if "mixlora_A" in name:
                parameter.data = parameter.data.to(torch.bfloat16)

    def unquantize(session: Session) -> None:
        layer = session.model.get_base_model().model.language_model.layers[0].mlp.up_proj
        layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)

    for break_it, message in (
        (train_head, "lm_head.weight is trainable"),
        (train_in_bf16, "not in fp32"),
        (unquantize, "not NF4"),
    ):
        with pytest.raises(UserError, match=message):
            run(break_it)
