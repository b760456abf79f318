"""The comparisons of methods run at toy size, on the real data set and a stand-in for its language model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import RealStandIn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLITS = ("validation", "test", "paraphrased", "held_out", "conversations")


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, real_standin: RealStandIn) -> Any:
    """What benchmarks/real.py compares, at toy size."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real

    return dataclasses.replace(
        real.ON_SMOLLM2,
        results=tmp_path / "results",
        make_data=lambda: real_standin.data,
        steps=2,
        batch=8,
        overrides=real_standin.overrides,
    )


PER_ROW = pytest.mark.xfail(strict=True, reason="random_routing makes a condition a row, not one a segment")


@pytest.mark.parametrize("name", ["mixlora", "lora-r64", pytest.param("random-routing", marks=PER_ROW)])
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
