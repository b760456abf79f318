"""Recipes are read from files and by name; what is none is said to be none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qmixlora.errors import UserError
from qmixlora.recipe import Part, Recipe, json_schema, load_recipe, shipped_recipes, validate

from .helpers import MINIMAL

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_numbers_are_read_as_yaml_writes_them(write: Write) -> None:
    path = write("model: {id: m}\ndata: {train: d}\ntrain: {learning_rate: 1e-4}")
    assert load_recipe(path).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("2E+1", 20), ("1_000", 1000), ("0o10", 8), ("0x10", 16), ("10.", 10), ("+7", 7)],
)
def test_numbers_of_yaml_1_2_are_numbers(write: Write, text: str, number: int) -> None:
    path = write(f"model: {{id: m}}\ndata: {{train: d}}\ntrain: {{max_steps: {text}}}")
    assert load_recipe(path).train.max_steps == number == load_recipe(path, [f"train.epochs={text}"]).train.epochs


@pytest.mark.parametrize(
    ("text", "message"),
    [("010", "write 10 .*0o"), ("-016", "write -16 .*0o"), ("08", "write 8 .*0o"), ("1:30", "got '1:30'")],
)
def test_numbers_that_yaml_1_1_reads_in_bases_of_8_and_60_are_refused(write: Write, text: str, message: str) -> None:
    start = "model: {id: m}\ndata: {train: d}\n"
    for name, overrides in ((f"{start}train: {{max_minutes: {text}}}", []), (start, [f"train.max_minutes={text}"])):
        with pytest.raises(UserError, match=message):
            load_recipe(write(name), overrides)


@pytest.mark.parametrize("text", ["1e3", "08", "010", "0o10", "1:30", "1_000", "12e4567"])
def test_a_text_that_a_reader_of_yaml_takes_for_a_number_is_written_as_text(write: Write, text: str) -> None:
    recipe = validate({"model": {"id": "m", "revision": text}, "data": {"train": [{"path": "d", "split": text}]}}, "x")
    assert load_recipe(write(recipe.to_yaml())) == recipe and validate(yaml.safe_load(recipe.to_yaml()), "y") == recipe


def test_overrides_stand_over_the_file(write: Write) -> None:
    path = write(yaml.safe_dump({**MINIMAL, "adapter": {"r": 3}}))
    recipe = load_recipe(path, ["adapter.r=2", "train.checkpointing.enabled=false", "data.validation=v.json"])
    assert (recipe.adapter.r, recipe.train.checkpointing.enabled, recipe.data.validation) == (2, False, "v.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.gates=hard", "Did you mean 'gate'"),
        ("adapter", "section.key=value"),
        ("model.id.x=1", "not a section"),
        ("adapter.r=[1", "not a YAML value"),
    ],
)
def test_a_wrong_override_is_refused(write: Write, override: str, message: str) -> None:
    path = write(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not YAML"), ("- 1", "mapping with the sections")])
def test_a_file_that_is_no_recipe_is_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(text))


@pytest.mark.parametrize("text", ["train:\n  seed: 1\n  epochs: 2\n  seed: 3\n", "train: {seed: 1,\n\n\n  seed: 3}\n"])
def test_a_key_that_stands_twice_is_refused_with_its_lines(write: Write, text: str) -> None:
    with pytest.raises(UserError, match=r"'seed' stands twice in one place, in lines \d and 4") as refused:
        load_recipe(write(text))
    assert refused.value.where.endswith("line 4")


def test_a_key_may_stand_again_beside_what_is_merged(write: Write) -> None:
    text = "model: {id: a}\ndata: &own {train: b, max_length: 9}\n"
    merged = "train: {max_steps: 1}\nexport: {}\n"
    again = text.replace("&own {train: b", "&own\n  <<: &all {train: c, max_length: 8}\n  train: b\n  max_length: 9\n#")
    assert load_recipe(write(again + merged)).data.max_length == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {id: m}\ntrain: {output: 2024-02-30}", "'2024-02-30' cannot be read as timestamp; quote it"),
        ("model: {id: m}\ntrain: {output: !!int abc}", "'abc' cannot be read as int"),
        ("model: {id: m}\ntrain: {output: !!bool maybe}", "'maybe' cannot be read as bool"),
        ("model: {id: m}\ntrain: {output: !!timestamp ''}", "'' cannot be read as timestamp"),
        ("model: {id: m}\ntrain: {seed: " + "9" * 5000 + "}", "999' cannot be read as int"),
        ("model: {id: m}\nkeep: &own [*own]", "a value stands in itself"),
        ("model: {id: m}\ndata: &own {train: d, metrics: *own}", "a value stands in itself"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match="This is not YAML") as refused:
        load_recipe(write(text))
    assert message in str(refused.value) and refused.value.where.endswith("line 2")


def test_what_is_nested_too_deeply_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="This is not YAML: it is nested too deeply"):
        load_recipe(write("a: " + "[" * 500 + "]" * 500))


@pytest.mark.parametrize("text", ["2024-02-30", "!!int abc", "9" * 5000, "&own [*own]", "[" * 500 + "]" * 500])
def test_an_override_that_cannot_be_is_refused(write: Write, text: str) -> None:
    with pytest.raises(UserError, match="not a YAML value") as refused:
        load_recipe(write(yaml.safe_dump(MINIMAL)), [f"train.output={text}"])
    assert refused.value.fix == "Quote it, if it is text."


def test_an_override_of_a_section_that_others_repeat_changes_it_alone(write: Write) -> None:
    text = "model: {id: m}\ndata:\n  columns: &own {question: q, answer: a}\n"
    parts = "  train:\n    - {path: x, columns: *own}\n    - {path: y, columns: {<<: *own, task: t}}\n"
    data = load_recipe(write(text + parts), ["data.columns.question=other"]).data
    assert data.columns is not None and data.columns.question == "other"
    assert [part.columns.question for part in data.train] == ["q", "q"]


def test_the_nearest_name_of_a_shipped_recipe_is_proposed() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'tiny-cpu'"):
        load_recipe("tiny-gpu")


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml"])
def test_a_folder_is_no_recipe_and_the_one_in_it_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="This is a folder, not a recipe") as caught:
        load_recipe(str(tmp_path))
    assert caught.value.fix == f"Did you mean {tmp_path / name}?"


def test_a_path_is_no_name_of_a_shipped_recipe(tmp_path: Path) -> None:
    (tmp_path / "tiny-cpu").mkdir()
    with pytest.raises(UserError, match="There is no such file or folder") as caught:
        load_recipe(str(tmp_path / "tini-cpu"))
    assert f"Did you mean {tmp_path / 'tiny-cpu'}?" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(UserError, match="There is no such recipe file") as caught:
        load_recipe(str(tmp_path / "nime.yaml"))
    assert (
        "nime.yaml" in str(caught.value) and "Did you mean" in str(caught.value) and "mine.yaml?" in str(caught.value)
    )


def test_a_resolved_recipe_reads_back_as_itself(write: Write) -> None:
    recipe = validate({**MINIMAL, "adapter": {"target_modules": ["q_proj"]}}, "x")
    assert load_recipe(write(recipe.to_yaml())) == recipe


def test_the_home_folder_is_read_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer and a shell read `~`; where the rest of a run did not, its checkpoints lay elsewhere."""
    monkeypatch.setenv("HOME", "/home/me")
    data = {"train": [{"path": "~/a.json", "image_root": "~/images"}], "validation": "~/b.json", "test": 0.1}
    recipe = validate({"model": {"id": "~/model"}, "data": data, "train": {"output": "~/runs/~a"}}, "x")
    [part] = recipe.data.train
    assert isinstance(part, Part) and (part.path, part.image_root) == ("/home/me/a.json", "/home/me/images")
    assert (recipe.model.id, recipe.data.validation) == ("/home/me/model", "/home/me/b.json")
    assert recipe.train.output == "/home/me/runs/~a"


def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = shipped_recipes()
    assert len(shipped) >= 42 and {"tiny-cpu", "real-cpu", "llava-1.5-7b-rtx4060-8gb"} <= set(shipped)
    for name, text in shipped.items():
        assert isinstance(load_recipe(name), Recipe)
        assert text.startswith("# ")
        assert "Card:" in text
    assert capsys.readouterr().err == "", "a shipped recipe has keys of an earlier release"


def test_the_json_schema_knows_every_key() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert {"pairing", "gate", "route_on", "task_mix"} <= schema["$defs"]["Adapter"]["properties"].keys()
    assert json.loads(json.dumps(schema)) == schema
