"""What a processor makes of texts and images tells it from another, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from qmixlora.backbone import base_record, open_processor, others_in, read_config, reader_record
from qmixlora.reader import read_by
from qmixlora.recipe import Model


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(dict(reversed(values.items()))))

    return edit


def of_images(**settings: Any) -> Callable[[Path], None]:
    return edit_json("processor_config.json", lambda values: values["image_processor"].update(settings))


def write_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("Please " + (folder / "chat_template.jinja").read_text())


def pad_left(values: Any) -> None:
    values.update(padding_side="left", name_or_path="/elsewhere")


def lower(values: Any) -> None:
    values["normalizer"] = {"type": "Lowercase"} if values["normalizer"] is None else None


@pytest.mark.parametrize(
    ("edit", "others"),
    [
        (write_template, "chat template"),
        (edit_json("tokenizer.json", lower), "tokenizer"),
        (of_images(image_mean=[0.1, 0.9, 0.1]), "image processor"),
        (of_images(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), "image processor"),
        (of_images(), ""),
        (of_images(size_divisor=None, disable_grouping=True), ""),
        (edit_json("processor_config.json", lambda values: values.update(transformers_version="9.0")), ""),
        (edit_json("tokenizer_config.json", pad_left), ""),
    ],
)
def test_a_model_is_another_by_what_a_text_or_an_image_becomes(
    backbone: Path, tmp_path: Path, edit: Callable[[Path], None], others: str
) -> None:
    copy = Path(shutil.copytree(backbone, tmp_path / "copy"))
    edit(copy)
    specs = (Model(id=str(backbone)), Model(id=str(copy)))
    own, now = (base_record(spec, read_config(spec), open_processor(spec, None)) for spec in specs)
    assert own.keys() >= {"weights", "template", "tokenizer", "images"}
    assert others_in(own, now) == others


def test_a_processor_that_was_used_and_saved_again_is_the_same(backbone: Path, tmp_path: Path) -> None:
    own = reader_record(Model(id=str(backbone)))
    processor: Any = open_processor(Model(id=str(backbone)), None)
    processor.tokenizer(["a", "a b c"], padding="max_length", max_length=9, truncation=True)
    assert read_by(processor) == own
    processor.save_pretrained(tmp_path)
    assert read_by(AutoProcessor.from_pretrained(tmp_path)) == own
