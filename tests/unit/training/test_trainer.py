"""The Trainer of a run: its steps, checkpointing, accumulation and optimisers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from qmixlora.data import load_conversations
from qmixlora.evaluation import generate_answers
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay

from .helpers import QUIET, descend_plainly, gradients, rows_of, warm


def test_batches_wait_for_their_turn_in_host_memory(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    trainer = make_trainer(session, rows_of(data, 2), None, tmp_path / "x", ProgressDisplay(QUIET))
    assert trainer.get_train_dataloader().device is None  # accelerate's own loaders send every batch to theirs


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
    made = []
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
        made.append((grads, buffers))
    assert made[0][0].keys() == made[1][0].keys()
    for (name, own), other in zip(made[0][0].items(), made[1][0].values(), strict=True):
        assert own.abs().sum() > 0, name
        torch.testing.assert_close(own, other)
    for own, other in zip(made[0][1].values(), made[1][1].values(), strict=True):
        torch.testing.assert_close(own, other)  # a recomputation is not counted twice


def test_checkpointing_recomputes_the_decoder_and_leaves_the_vision_tower_alone(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    make_trainer(session, [], None, tmp_path / "x", ProgressDisplay(QUIET))
    session.model.train()
    calls, needs_grad = [], []
    base = session.backbone.model
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
    generate_answers(session, rows, 2)
    session.model.train()
    after = gradients(session, batch)
    assert before.keys() == after.keys()
    for name, grad in before.items():
        torch.testing.assert_close(grad, after[name])


def test_evaluating_repacks_no_weight(make_recipe: Callable[..., Recipe], data: Path) -> None:
    """bitsandbytes does it for processors with AVX-512-BF16, in bf16; its other ways of saying so are looked at too."""
    session = open_session(make_recipe(), [])
    session.model.eval()
    generate_answers(session, rows_of(data, 2), 2)
    states = [m.weight.quant_state for m in session.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert states and not any(getattr(state, "packing_format_for_cpu", False) for state in states)


def test_eight_times_one_accumulated_is_one_times_eight(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers differ in length, so a mean of per-batch means would be wrong."""
    descend_plainly(monkeypatch)
    results = []
    for size, steps in ((8, 1), (1, 8)):
        spec = {"micro_batch_size": size, "gradient_accumulation": steps, "max_steps": 3, "learning_rate": 1.0}
        recipe = make_recipe(train={**spec, "output": str(tmp_path / f"run{size}")})
        folder = train(recipe, console=QUIET)
        results.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


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
    whole = [p for name, p in session.model.named_parameters() if "modules_to_save" in name and p.numel() >= 4096]
    assert whole and all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in whole)
