"""The recipe is strict: all mistakes at once, each with its path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from qmixlora.recipe import Edit, Recipe, edited, validate
from qmixlora.recipe.section import Section

from .helpers import MINIMAL, mistakes_in

WRONG = {
    "model": {"id": "m", "quantisation": "nf4"},
    "adapter": {"r": 8, "num_factors": 4, "gate": False, "rank": 3},
    "data": {},
    "train": {"learning_rate": "fast", "checkpointing": {"enabeld": True}, "micro_batch_size": 0},
    "trian": {},
}


def test_every_mistake_is_reported_at_once_with_its_path() -> None:
    message = mistakes_in(WRONG)
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
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("amount", "words"),
    [(1.5, "a share below 1, or a whole number of rows"), (0, "greater than 0"), (True, "a valid number")],
)
def test_an_amount_that_cannot_be_cut_is_one_mistake(amount: Any, words: str) -> None:
    message = mistakes_in(
        {"model": {"id": "m"}, "data": {"train": "t", "validation": amount}, "train": {"eval_every": 5}}
    )
    assert "has 1 mistake:" in message and "data.validation: input should be " + words in message


def test_the_message_says_where_the_mistakes_are_and_where_the_keys_are_listed() -> None:
    message = mistakes_in(WRONG)
    assert "where: r.yaml" in message and "fix:" in message


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("adapter", {"gate": "weighted", "r": 1}, "needs adapter.r >= 2"),
        ("adapter", {"method": "lora", "task_mix": 0.5}, "no gates to replace"),
        ("adapter", {"router": "model", "route_on": "instruction"}, "adapter.router: model needs adapter.route_on"),
        ("train", {"checkpointing": {"enabled": False, "offload": True}}, "nothing to offload"),
        ("train", {"batch_tokens": 4096, "micro_batch_size": 2}, "leave micro_batch_size out"),
        ("train", {"batch_tokens": 1024}, "may have 2048 tokens"),
        ("train", {"eval_every": 5}, "set data.validation"),
        ("model", {"id": "x", "stream_layers": 2}, "stream 3 or more"),
        ("model", {"id": "x", "stream_layers": 4, "quantization": "none"}, "only 4-bit layers are streamed"),
        ("model", {"id": "x", "offload_embeddings": True, "quantize_embeddings": "nf4"}, "choose one of the two"),
        ("train", {"cache_features": True}, "set adapter.projector: frozen"),
        ("adapter", {"route_on": "instruction"}, "needs a layer's input as a whole"),
    ],
)
def test_values_that_do_not_go_together_are_refused(section: str, values: dict[str, Any], message: str) -> None:
    chunked = {"train": {"mlp_chunk": 64}} if section == "adapter" else {}
    assert message in mistakes_in({**MINIMAL, **chunked, section: values})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "a", "wieght": 2}]}, "data.train.0.wieght: unknown key. Did you mean 'weight'?"),
        ({"train": "a", "columns": {"question": "q", "answer": "a", "image": [1]}}, "data.columns.image.0: input"),
    ],
)
def test_a_mistake_in_a_list_is_one_mistake(data: dict[str, Any], message: str) -> None:
    told = mistakes_in({**MINIMAL, "data": data})
    assert "1 mistake:" in told and message in told


@pytest.mark.parametrize("checkpointing", [{"enabled": False}, {"every_n_layers": 2}])
def test_streamed_layers_need_checkpointing_of_every_layer(checkpointing: dict[str, Any]) -> None:
    values = {**MINIMAL, "model": {"id": "x", "stream_layers": 4}, "train": {"checkpointing": checkpointing}}
    assert "gone when the backward pass" in mistakes_in(values)


def test_layers_are_streamed_with_the_default_checkpointing() -> None:
    recipe = validate({**MINIMAL, "model": {"id": "x", "stream_layers": 4}}, "x")
    assert edited(recipe, ["model.stream_layers=8"]).model.stream_layers == 8


def test_batches_by_tokens_and_by_length_contradict_each_other() -> None:
    values = {**MINIMAL, "data": {"train": "d.json", "group_by_length": True}, "train": {"batch_tokens": 4096}}
    assert "leave data.group_by_length out" in mistakes_in(values)


def numbers_of(section: type[Section], path: str = "") -> Iterator[str]:
    """The paths of all values that are numbers, or none, or one kind of several."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from numbers_of(field.annotation, f"{path}{key}.")
        elif {int, float} & {field.annotation, *get_args(field.annotation)}:
            yield f"{path}{key}"


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_no_number(value: bool) -> None:
    paths = {*numbers_of(Recipe), "data.validation", "data.test"}
    assert {"train.max_steps", "train.learning_rate", "adapter.r", "train.checkpointing.every_n_layers"} <= paths
    told = mistakes_in(Edit(dict.fromkeys(paths, value)).put_into({"model": {"id": "m"}, "data": {"train": "d"}}))
    for path in paths:
        assert f"\n    {path}: input should be a valid " in told
    assert told.count(f"got {value} (YAML reads on, off, yes and no as booleans)") == len(paths)


def test_a_boolean_is_no_number_in_a_part_of_the_data() -> None:
    told = mistakes_in({**MINIMAL, "data": {"train": [{"path": "a", "weight": True}]}})
    assert "1 mistake:" in told and "data.train.0.weight: input should be a valid number, got True" in told


def test_a_boolean_stays_one_where_it_is_one_kind_of_several() -> None:
    assert edited(validate(MINIMAL, "x"), ["data.group_by_length=yes"]).data.group_by_length is True


@pytest.mark.parametrize(("written", "steps"), [("10", 10), (10.0, 10), ("1e-4", None)])
def test_a_number_may_still_be_written_as_text_or_with_a_point(written: Any, steps: int | None) -> None:
    key = "max_steps" if steps else "learning_rate"
    train = validate({**MINIMAL, "train": {key: written}}, "x").train
    assert getattr(train, key) == (steps or 1e-4)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.seed", -1, "train.seed: input should be greater than or equal to 0, got -1"),
        ("train.seed", 2**32, "train.seed: input should be less than 4294967296"),
        ("adapter.target_modules", [], "adapter.target_modules: list should have at least 1 item"),
    ],
)
def test_what_no_run_can_begin_with_is_one_mistake(path: str, value: Any, message: str) -> None:
    told = mistakes_in(Edit({path: value}).put_into({"model": {"id": "m"}, "data": {"train": "d"}}))
    assert "1 mistake:" in told and message in told


def test_the_largest_seed_is_one() -> None:
    assert edited(validate(MINIMAL, "x"), [f"train.seed={2**32 - 1}"]).train.seed == 2**32 - 1


@pytest.mark.parametrize("name", ["validation", "test"])
@pytest.mark.parametrize("text", ["1e-1", "0.1", "100", "5e1", "10%", "10 %", "0,1"])
def test_a_number_that_yaml_reads_as_text_is_no_file(name: str, text: str) -> None:
    told = mistakes_in({**MINIMAL, "data": {"train": "d.json", name: text}})
    assert "1 mistake:" in told and f"data.{name}: {text!r} is text in YAML" in told and f"./{text}" in told


@pytest.mark.parametrize("text", ["./0.1", "nan", "v1.0", "1.json", "inf"])
def test_a_name_with_a_number_in_it_is_a_file(text: str) -> None:
    assert validate({**MINIMAL, "data": {"train": "d.json", "validation": text}}, "x").data.validation == text


def test_an_empty_section_is_the_default_one() -> None:
    empty = {**MINIMAL, "adapter": None, "train": {"checkpointing": None}, "export": None}
    assert validate(empty, "x") == validate(MINIMAL, "x")
    assert validate({**MINIMAL, "data": {"train": "d.json", "columns": None}}, "x").data.columns is None
    told = mistakes_in({"model": None, "data": None})
    assert "2 mistakes" in told and "model.id: missing" in told and "data.train: missing" in told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": [1]}, "train: a section with keys such as output, epochs, max_steps, got [1]"),
        ({"train": {"checkpointing": False}}, "train.checkpointing: a section with keys such as enabled,"),
        ({"data": {"train": ["a"]}}, "data.train.0: a section with keys such as path, split, weight, got 'a'"),
    ],
)
def test_a_value_in_place_of_a_section_is_told_of_its_keys(values: dict[str, Any], message: str) -> None:
    told = mistakes_in({**MINIMAL, **values})
    assert "1 mistake:" in told and message in told
