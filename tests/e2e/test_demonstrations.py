"""The demonstrations, end to end at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import CommandLine

from .conftest import RealStandIn


@pytest.mark.long
def test_the_real_demonstration_scores_every_task_and_its_export(
    qmixlora: CommandLine, real_standin: RealStandIn, tmp_path: Path
) -> None:
    files = [f"data.{split}={real_standin.data / f'{split}.json'}" for split in ("train", "validation", "test")]
    short = ["train.max_steps=2", "train.eval_every=null", "train.save_every=null", "export.polish=0"]
    done = qmixlora("demo", "--real", "--json", "--out", tmp_path / "demo", *real_standin.overrides, *files, *short)
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["tasks"]) == {"backbone", "tuned", "blind", "exported"}  # nothing is merged
    assert summary["tasks"]["exported"].keys() == summary["tasks"]["tuned"].keys() >= {"caption", "text", "handwriting"}
    assert len(list((tmp_path / "demo" / "run" / "exports").glob("*-lora"))) == 15
