"""The comparisons of methods run at toy size, on the real data set and a stand-in for its language model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
            make_data=lambda: real_standin.data,
            steps=2,
            batch=8,
            overrides=real_standin.overrides,
        )


Fresh = Callable[[str], tuple[Any, dict[str, Any]]]


@pytest.fixture(scope="module")
def fresh(comparison: Any) -> Fresh:
    """A fresh trainer of a method, its pools B drawn at random, and a batch with conversations in it, on its device."""

    def make(name: str) -> tuple[Any, dict[str, Any]]:
        from comparison import PreparedCollator, Run, fresh_trainer

        session, rows, trainer = fresh_trainer(
            comparison, Run(name, comparison.methods[name], 1e-3, 0), comparison.results
        )
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
    from comparison import PreparedCollator
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
