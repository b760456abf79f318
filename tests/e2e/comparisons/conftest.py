"""What benchmarks/real.py compares, at toy size."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import RealStandIn

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
Fresh = Callable[[str], tuple[Any, dict[str, Any]]]


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


@pytest.fixture(scope="module")
def few_tasks(comparison: Any, real_standin: RealStandIn, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same on three of the tasks, one step for each; the held-out tasks are all there."""
    folder, tasks = tmp_path_factory.mktemp("few"), ("caption", "digit", "text")
    shutil.copytree(real_standin.data / "images", folder / "images")
    for file in real_standin.data.glob("*.json"):
        rows = json.loads(file.read_text(encoding="utf-8"))
        kept = [
            row for row in rows if file.stem == "held_out" or (row["task"] in tasks and len(row["conversations"]) == 2)
        ]
        (folder / file.name).write_text(json.dumps(kept or rows[:1]), encoding="utf-8")
    return dataclasses.replace(comparison, make_data=lambda: folder, runs=folder / "runs", steps=3)


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
