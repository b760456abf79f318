"""An export says where generation stops, if its base does not know it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForImageTextToText

from qmixlora.export.stops import GENERATION
from qmixlora.session import open_run

from .helpers import edit_recipe, exported


def with_another_end(run: Path, backbone: Path, tmp_path: Path) -> None:
    """The run on a base whose chat template ends answers in a token that its generation does not stop at."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in backbone.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<eos>", "<unk>"), encoding="utf-8")
    edit_recipe(run, model__id=str(folder))


def test_a_merged_checkpoint_stops_where_the_run_did(run: Path, backbone: Path, tmp_path: Path) -> None:
    with_another_end(run, backbone, tmp_path)
    folder = exported(run, forms=("merged",)).folder
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [2, 4]
    assert open_run(folder).collator.stop_ids == [2, 4]


def test_a_lora_says_where_to_stop(run: Path, backbone: Path, tmp_path: Path) -> None:
    with_another_end(run, backbone, tmp_path)
    fidelity = exported(run, forms=("lora",))
    assert json.loads((fidelity.folder / GENERATION).read_text(encoding="utf-8")) == {"eos_token_id": [2, 4]}
    assert any(GENERATION in note for note in fidelity.notes)


def test_a_base_that_knows_keeps_its_generation_config(run: Path, backbone: Path) -> None:
    folder = exported(run, forms=("merged",)).folder
    assert (folder / GENERATION).read_bytes() == (backbone / GENERATION).read_bytes()
    assert not (exported(run, forms=("lora",)).folder / GENERATION).exists()
