"""The recipe: strict, all mistakes at once, each with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, edited, json_schema, load_recipe, shipped_recipes, validate

MINIMAL = {"model": {"id": "m"}, "data": {"train": "d.json"}}


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def mistakes(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        validate(values, "r.yaml")
    return str(caught.value)


def test_every_mistake_is_reported_at_once_with_its_path() -> None:
    message = mistakes(
        {
            "model": {"id": "m", "quantisation": "nf4"},
            "adapter": {"r": 8, "num_factors": 4, "gate": False, "rank": 3},
            "data": {},
            "train": {"learning_rate": "fast", "checkpointing": {"enabeld": True}, "micro_batch_size": 0},
            "trian": {},
        }
    )
    for expected in (
        "9 mistakes",
        "model.quantisation: unknown key. Did you mean 'quantization'?",
        "adapter.gate:",
        "quote the word",
        "adapter.rank: unknown key",
        "data.train: missing",
        "train.learning_rate:",
        "train.checkpointing.enabeld: unknown key. Did you mean 'enabled'?",
        "train.micro_batch_size: input should be greater than or equal to 1, got 0",
        "trian: unknown key. Did you mean 'train'?",
        "adapter.r: 8 is more than adapter.num_factors, 4",
        "where: r.yaml",
        "fix:",
    ):
        assert expected in message


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {id: m}\ndata: {train: d}\ntrain: {learning_rate: 1e-4}")
    assert load_recipe(path).train.learning_rate == 1e-4
    assert load_recipe(path, ["train.learning_rate=3e-5"]).train.learning_rate == 3e-5


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["adapter.r=2", "train.checkpointing.enabled=false", "data.validation=v.json"])
    assert (recipe.adapter.r, recipe.train.checkpointing.enabled, recipe.data.validation) == (2, False, "v.json")
    for override, message in (
        ("adapter.gates=hard", "Did you mean 'gate'"),
        ("adapter", "section.key=value"),
        ("model.id.x=1", "not a section"),
        ("adapter.r=[1", "not a YAML value"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(path, [override])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("adapter", {"gate": "weighted", "r": 1}, "needs adapter.r >= 2"),
        ("adapter", {"method": "lora", "task_mix": 0.5}, "no gates to replace"),
        ("train", {"checkpointing": {"enabled": False, "offload": True}}, "nothing to offload"),
        ("train", {"eval_every": 5}, "set data.validation"),
        ("model", {"id": "x", "stream_layers": 2}, "stream 3 or more"),
        ("model", {"id": "x", "stream_layers": 4, "quantization": "none"}, "only 4-bit layers are streamed"),
        ("model", {"id": "x", "offload_embeddings": True, "quantize_embeddings": "nf4"}, "choose one of the two"),
        ("train", {"cache_features": True}, "set adapter.train_projector: false"),
    ],
)
def test_values_that_do_not_go_together(section: str, values: dict[str, Any], message: str) -> None:
    assert message in mistakes({**MINIMAL, section: values})


def test_streamed_layers_need_checkpointing() -> None:
    values = {**MINIMAL, "model": {"id": "x", "stream_layers": 4}}
    for checkpointing in ({"enabled": False}, {"every_n_layers": 2}):
        assert "gone when the backward pass" in mistakes({**values, "train": {"checkpointing": checkpointing}})
    assert edited(validate(values, "x"), ["model.stream_layers=8"]).model.stream_layers == 8


def test_what_is_no_recipe(tmp_path: Path) -> None:
    for text, message in (("a: [1", "not YAML"), ("- 1", "mapping with the sections")):
        with pytest.raises(UserError, match=message):
            load_recipe(write(tmp_path, text))
    with pytest.raises(UserError, match=r"Did you mean 'tiny-cpu'"):
        load_recipe("tiny-gpu")
    with pytest.raises(UserError, match="Cannot read the recipe"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = validate({**MINIMAL, "adapter": {"target_modules": ["q_proj"]}}, "x")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_every_shipped_recipe_is_valid() -> None:
    shipped = shipped_recipes()
    assert len(shipped) == 26 and {"tiny-cpu", "llava-1.5-7b-rtx4060-8gb"} <= set(shipped)
    for name, text in shipped.items():
        assert isinstance(load_recipe(name), Recipe)
        assert text.startswith("# ")
        assert "Card:" in text


def test_the_json_schema_knows_every_key() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert {"pairing", "gate", "route_on", "task_mix"} <= schema["$defs"]["Adapter"]["properties"].keys()
    assert json.loads(json.dumps(schema)) == schema
