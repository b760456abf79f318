"""An edit says one thing in three ways: as it is typed, as sections of a recipe, and as the recipe that it leads to."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qmixlora.errors import UserError
from qmixlora.recipe import Edit, Recipe, edited, leaves, validate

from .helpers import MINIMAL


@pytest.fixture
def recipe() -> Recipe:
    return validate({**MINIMAL, "adapter": {"r": 3}}, "x")


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("4", 4),
        ("false", False),
        ("null", None),
        ("", None),
        ("nf4", "nf4"),
        ("'4'", "4"),
        ("[q_proj, o_proj]", ["q_proj", "o_proj"]),
        ("a=b", "a=b"),
    ],
)
def test_values_are_parsed_as_yaml(typed: str, value: Any) -> None:
    assert Edit.parse([f"section.key={typed}"]).values == {"section.key": value}


def test_of_two_overrides_of_one_path_the_later_one_counts() -> None:
    assert Edit.parse(["adapter.r=2", "adapter.r=5"]) == Edit({"adapter.r": 5})


@pytest.mark.parametrize(
    ("override", "message"),
    [("adapter.r", "section.key=value"), ("=4", "section.key=value"), ("adapter.r=[1", "is not a YAML value")],
)
def test_what_is_no_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Edit.parse([override])


def test_applied_it_changes_its_paths_alone(recipe: Recipe) -> None:
    changed = Edit({"adapter.r": 5, "train.checkpointing.enabled": False}).apply(recipe)
    assert (changed.adapter.r, changed.train.checkpointing.enabled) == (5, False)
    expected = recipe.model_dump()
    expected["adapter"]["r"], expected["train"]["checkpointing"]["enabled"] = 5, False
    assert changed.model_dump() == expected


def test_applied_it_leaves_the_recipe_as_it_was(recipe: Recipe) -> None:
    Edit({"adapter.r": 5}).apply(recipe)
    assert recipe.adapter.r == 3


def test_values_that_do_not_go_with_the_recipe_are_refused_by_the_edit_as_typed(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"more than adapter\.num_factors") as caught:
        Edit({"adapter.num_factors": 2}).apply(recipe)
    assert "where: adapter.num_factors=2" in str(caught.value)


def test_a_value_is_no_section(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="'id' is a value, not a section"):
        Edit({"model.id.x": 1}).apply(recipe)


def test_an_empty_edit_changes_nothing(recipe: Recipe) -> None:
    assert Edit({}).apply(recipe) == recipe


values = st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.lists(st.text(max_size=6), max_size=3)
paths = st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6}){1,2}", fullmatch=True)


@given(st.dictionaries(paths, values, max_size=4))
def test_an_edit_typed_and_parsed_is_itself(changes: dict[str, Any]) -> None:
    assert Edit.parse(Edit(changes).overrides()) == Edit(changes)


@given(st.floats(min_value=1e-12, max_value=1e3))
def test_a_learning_rate_that_was_typed_is_the_same_number(rate: float) -> None:
    recipe = validate(MINIMAL, "x")
    typed = Edit({"train.learning_rate": rate}).overrides()
    assert edited(recipe, typed).train.learning_rate == rate


def test_words_that_yaml_reads_as_themselves_are_typed_bare() -> None:
    edit = Edit({"model.quantization": "none", "data.train": "yes", "model.revision": None})
    assert edit.overrides() == ["model.quantization=none", 'data.train="yes"', "model.revision=null"]


@pytest.mark.parametrize("word", ["2024-02-30", "2024-02-28", "9" * 5000, "1e3", "010"])
def test_words_that_yaml_would_read_as_a_date_or_number_are_quoted(word: str) -> None:
    for edit in (Edit({"train.output": word}), Edit({"train.report_to": [word]})):
        assert Edit.parse(edit.overrides()) == edit


def test_as_yaml_it_is_sections_of_a_recipe() -> None:
    edit = Edit({"train.checkpointing.offload": True, "model.stream_layers": 4, "train.optimizer": "adamw"})
    sections = {
        "train": {"checkpointing": {"offload": True}, "optimizer": "adamw"},
        "model": {"stream_layers": 4},
    }
    assert yaml.safe_load(edit.yaml()) == sections and edit.yaml().startswith("train:")


@pytest.mark.parametrize("word", [":", "[x", "a: b", "# x", "\u1f600", "\U0001f600 ?", "two\nlines", " spaces ", "@"])
def test_words_that_yaml_would_not_read_as_themselves_are_typed_on_one_line_and_read_back(word: str) -> None:
    [typed] = Edit({"data.train": word}).overrides()
    assert "\n" not in typed and Edit.parse([typed]) == Edit({"data.train": word})


def test_of_two_edits_together_the_later_ones_values_count_where_they_meet() -> None:
    first, later = Edit({"adapter.r": 2, "adapter.alpha": 4}), Edit({"adapter.r": 5, "train.seed": 1})
    assert first | later == Edit({"adapter.r": 5, "adapter.alpha": 4, "train.seed": 1})


def test_two_edits_together_do_what_they_do_one_after_the_other(recipe: Recipe) -> None:
    first, later = Edit({"adapter.r": 2, "adapter.alpha": 4}), Edit({"adapter.r": 5, "train.seed": 1})
    assert (first | later).apply(recipe) == later.apply(first.apply(recipe))


def test_leaves_put_together_are_the_recipe_whatever_its_own_keys_are() -> None:
    own = {"a.b": "exact", "c": "f1"}
    columns = {"question": "q", "answer": "a", "hint": "h"}
    data = {"train": "d", "columns": columns, "template": "{hint} {question}", "metrics": own, "held_out": own}
    arguments = {"a.b": {"c": 1}}
    values = validate({"model": {"id": "m", "template_arguments": arguments}, "data": data}, "x").model_dump()
    paths = dict(leaves(values))
    assert Edit(paths).put_into({}) == values
    assert paths["data.metrics"] == own and paths["model.template_arguments"] == arguments
    assert paths["data.columns.hint"] == "h" and paths["train.checkpointing.enabled"] is True
