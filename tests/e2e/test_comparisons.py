"""The comparisons of methods run at toy size, on the real data set and a stand-in for its language model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.data import IGNORED
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import routed_as

from .conftest import RealStandIn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLITS = ("validation", "test", "paraphrased", "held_out", "conversations")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, real_standin: RealStandIn) -> Iterator[Any]:
    """What benchmarks/real.py compares, at toy size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import real

        yield dataclasses.replace(
            real.ON_SMOLLM2,
            results=tmp_path_factory.mktemp("comparison") / "results",
            runs=tmp_path_factory.mktemp("runs"),
            make_data=lambda: real_standin.data,
            steps=2,
            batch=8,
            overrides=real_standin.overrides,
        )


Fresh = Callable[[str], tuple[Any, dict[str, Any]]]


@pytest.fixture(autouse=True)
def undone(comparison: Any) -> Iterator[None]:
    """What a method changes of the package's modules is undone after each test."""
    import experiments

    with experiments.undone():
        yield


@pytest.fixture(scope="module")
def fresh(comparison: Any) -> Fresh:
    """A fresh trainer of a method, its pools B drawn at random, and a batch with conversations in it, on its device."""

    def make(name: str) -> tuple[Any, dict[str, Any]]:
        from comparison import Run, fresh_session, fresh_trainer
        from prepared import PreparedCollator

        method = comparison.methods[name]
        session, rows = fresh_session(comparison, Run(name, method, 1e-3, 0))
        trainer = fresh_trainer(session, rows, method, comparison.results)
        talks = [row for row in rows if not isinstance(row["task"], str)]
        single = [row for row in rows if isinstance(row["task"], str) and "pixels" in row]
        batch = PreparedCollator(session.collator.processor, 1024)([*talks[:2], *single[:2]])
        torch.manual_seed(0)
        for parameter_name, parameter in trainer.model.named_parameters():
            if "_B." in parameter_name and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        return trainer, batch

    return make


@pytest.mark.parametrize("name", ["mixlora", "lora-r64", "random-routing"])
def test_a_run_leaves_its_scores_and_is_not_run_again(comparison: Any, name: str) -> None:
    import tables
    from comparison import Run, run_all

    run = Run(name, comparison.methods[name], 1e-3, 0)
    run_all(comparison, [run])
    file = comparison.file_of(run)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert all(0 <= result[split]["mean"] <= 1 for split in SPLITS) and len(result["test"]) == 16
    written = file.stat().st_mtime_ns
    run_all(comparison, [run])
    assert file.stat().st_mtime_ns == written
    assert f"| {name} | 0.001 (0.001) | 1 |" in tables.summary(tables.read(comparison.results), [name])


def test_rows_made_once_are_batched_as_they_are_made_anew(comparison: Any, real_standin: RealStandIn) -> None:
    from prepared import PreparedCollator
    from transformers import AutoProcessor

    from qmixlora.data import Collator, load_conversations

    processor = AutoProcessor.from_pretrained(real_standin.model)
    rows = list(load_conversations(str(real_standin.data / "train.json")))
    once = PreparedCollator(processor, 1024)
    chosen = [0, 9, 27, len(rows) - 1]
    pictured = [index for index in chosen if rows[index]["images"]]
    ready = once.prepare(rows)
    for indices in (pictured, [index for index, row in enumerate(rows) if not row["images"]]):
        before, again = Collator(processor, 1024)([rows[i] for i in indices]), once([ready[i] for i in indices])
        assert before.keys() == again.keys()
        for key, value in before.items():
            assert value == again[key] if key == "tasks" else (value == again[key]).all()


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
        torch.testing.assert_close(first_LNEF[lower], (torch.eye(16) / 4).expand(first_LNEF[lower].shape))


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


def test_loras_of_tasks_answer_their_own_and_none_that_is_new(comparison: Any) -> None:
    from comparison import Run, execute

    result = execute(comparison, Run("lora-per-task", comparison.methods["lora-per-task"], 1e-3, 0))
    assert "held_out" not in result and len(result["test"]) == len(result["paraphrased"]) + 1 == 16
    assert result["trainable_parameters"] % 15 == 0


def test_arrow_sends_tokens_to_the_loras_that_answer_most_to_them(comparison: Any) -> None:
    from comparison import Run, trained
    from peft.tuners.lora.bnb import Linear4bit

    session = trained(comparison, Run("arrow", comparison.methods["arrow"], 1e-2, 0)).session
    layers = {name: module for name, module in session.model.named_modules() if hasattr(module, "lora_arrow")}
    assert len(layers) == 14 and all(isinstance(module, Linear4bit) for module in layers.values())
    assert not any("vision" in name for name in layers) and session.model.active_adapter == "arrow_router"
    layer = next(iter(layers.values()))
    x_BSI = torch.randn(2, 3, layer.in_features)
    names = [name for name in layer.lora_A if name != "arrow_router"]
    assert len(names) == 15
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
    leading_TI = torch.stack([torch.linalg.svd(b @ a).Vh[0] for a, b in pairs])
    score_BST = (x_BSI @ leading_TI.T).abs()
    top = score_BST.topk(3, dim=-1)
    gate_BST = torch.zeros_like(score_BST).scatter(-1, top.indices, top.values.softmax(dim=-1))
    each_BSTO = torch.stack([2 * x_BSI @ a.T @ b.T for a, b in pairs], dim=2)
    expected = layer.base_layer(x_BSI) + (gate_BST[..., None] * each_BSTO).sum(dim=2)
    torch.testing.assert_close(layer(x_BSI), expected, atol=1e-4, rtol=1e-3)
