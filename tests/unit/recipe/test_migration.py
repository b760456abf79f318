"""Recipes of earlier releases: their keys are renamed, with a note, and contradict no new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.errors import UserError
from qmixlora.mixlora import MixLoraConfig
from qmixlora.recipe import Edit, edited, load_recipe, load_run_recipe, validate

MODEL = "model: {id: x}\ndata: {train: a}\n"


@pytest.mark.parametrize(("old", "new"), [("true", "full"), ("false", "frozen")])
def test_an_old_recipe_loads_with_a_note(old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{MODEL}adapter: {{train_projector: {old}}}\n")
    assert load_recipe(str(file)).adapter.projector == new
    assert f"adapter.train_projector: {old} is adapter.projector: {new} now" in capsys.readouterr().err


def test_a_run_of_an_earlier_release_loads_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{MODEL}adapter: {{train_projector: false}}\n")
    assert load_run_recipe(tmp_path).adapter.projector == "frozen"
    assert not capsys.readouterr().err


def test_an_override_counts_more_than_the_old_key_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{MODEL}adapter: {{train_projector: true}}\n")
    assert load_recipe(str(file), ["adapter.projector=lora"]).adapter.projector == "lora"
    assert load_recipe(str(file), ["adapter.train_projector=false"]).adapter.projector == "frozen"


def test_an_old_override_changes_a_new_recipe() -> None:
    recipe = validate({"model": {"id": "x"}, "data": {"train": "a"}}, "test")
    assert edited(recipe, ["adapter.train_projector=false"]).adapter.projector == "frozen"
    assert Edit.parse(["adapter.train_projector=true"]).values == {"adapter.projector": "full"}


def test_keys_that_contradict_each_other_are_refused() -> None:
    adapter = {"train_projector": True, "projector": "lora"}
    with pytest.raises(UserError, match=r"train_projector: true.*projector: lora contradict"):
        validate({"model": {"id": "x"}, "data": {"train": "a"}, "adapter": adapter}, "test")
    adapter["projector"] = "full"
    assert validate({"model": {"id": "x"}, "data": {"train": "a"}, "adapter": adapter}, "test").adapter.projector


def test_an_old_key_with_another_value_is_told_of_the_new_one() -> None:
    values = {"model": {"id": "x"}, "data": {"train": "a"}, "adapter": {"train_projector": "some"}}
    with pytest.raises(UserError, match=r"adapter.train_projector: unknown key. Did you mean adapter.projector"):
        validate(values, "test")


def test_a_key_that_is_gone_is_left_out_where_nothing_changes_and_refused_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{MODEL}adapter: {{temperature: 1.0}}\n")
    assert load_recipe(str(file)).adapter.r == 16
    assert "adapter.temperature: 1.0 is left out" in capsys.readouterr().err
    file.write_text(f"{MODEL}adapter: {{temperature: 0.5}}\n")
    with pytest.raises(UserError, match=r"adapter.temperature: 0.5, a key of earlier releases, is gone"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [("pairing", "independent", "tied"), ("route_on", "prompt", "embedding")],
)
def test_a_value_that_is_gone_is_refused_with_what_to_take(key: str, value: str, instead: str) -> None:
    with pytest.raises(UserError, match=rf"adapter.{key}: {value}, a value of earlier releases, is gone") as error:
        validate({"model": {"id": "x"}, "data": {"train": "y"}, "adapter": {key: value}}, "test")
    assert f"Take {instead}" in (error.value.fix or "") and "release 0.1" in (error.value.fix or "")
    with pytest.raises(ValueError, match=rf"{key}='{value}' is none of .*release 0.1 had it"):
        MixLoraConfig(**{key: value})
