"""What a report takes from the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

from qmixlora.recipe import validate
from qmixlora.report.record import RunRecord


def test_the_speed_is_by_the_samples_that_were_logged(tmp_path: Path) -> None:
    """Micro-batches that are filled by tokens, and several processes, take other numbers than the recipe's product."""
    values = {"model": {"id": "someone/model"}, "data": {"train": "train.json"}, "train": {"gradient_accumulation": 2}}
    (tmp_path / "recipe.yaml").write_text(validate(values, "test").to_yaml(), encoding="utf-8")
    logs = [{"step": 1, "loss": 1.0, "seconds": 1.0, "samples": 12}, {"step": 2, "loss": 1.0, "seconds": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs), encoding="utf-8")
    assert list(RunRecord.read(tmp_path).speeds()) == [(1, 12.0), (2, 2.0)]  # the second as earlier releases logged it
