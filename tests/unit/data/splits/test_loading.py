"""Splits: sources of their own, or cut from the training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qmixlora.data import load_split
from qmixlora.data.splits.loading import read_splits
from qmixlora.errors import UserError
from qmixlora.recipe import Columns, Data, Recipe, edited, validate


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path]) -> Recipe:
    """A hundred samples without images, of two tasks."""
    rows = []
    for index in range(100):
        turns = [{"from": "human", "value": f"what ? {index}"}, {"from": "gpt", "value": "red"}]
        rows.append({"task": "ab"[index % 2], "conversations": turns})
    return make_recipe(data={"train": str(write_json("data.json", rows)), "validation": None, "test": None})


def questions(recipe: Recipe, split: str) -> set[str]:
    return {row["turns"][0]["text"] for row in load_split(recipe.data, split)}


def test_a_share_and_a_number_are_cut_from_the_training_data(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1", "data.test=20"])
    parts = {split: questions(cut, split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert set.union(*parts.values()) == questions(recipe, "train")


def test_what_is_left_out_is_told_of_all_that_was_read(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(recipe.data.sources[0])
    rows = json.loads(source.read_text())
    rows[7]["conversations"][1]["value"] = None
    source.write_text(json.dumps(rows))
    for split, name in (("train", str(source)), ("test", f"data.test, cut from {source}")):
        load_split(edited(recipe, ["data.test=0.1", "data.on_bad_sample=skip"]).data, split)
        assert f"{name}: 1 of 100 samples left out" in capsys.readouterr().err


def test_every_look_at_a_split_is_the_same_and_the_seed_changes_it(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1"])
    assert questions(cut, "validation") == questions(cut, "validation")
    assert questions(cut, "validation") != questions(edited(cut, ["data.split_seed=1"]), "validation")


def of_a_run(recipe: Recipe) -> Recipe:
    """The recipe as a run on this data writes it."""
    held_out = read_splits(recipe.data, ["train"]).held_out
    return edited(recipe, [f"data.held_out={held_out}"])


def test_what_a_run_held_out_is_read_again(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1", "data.test=20"])
    assert questions(of_a_run(cut), "test") == questions(cut, "test")
    assert read_splits(recipe.data, ["train"]).held_out == {}


def test_other_rows_than_a_run_learned_are_told_once(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(recipe.data.sources[0])
    run = edited(recipe, [f"data.learned={read_splits(recipe.data, ['train']).learned}"])
    load_split(run.data, "train")
    assert not capsys.readouterr().err
    rows = json.loads(file.read_text())
    rows[3]["conversations"][1]["value"] = "blue"
    file.write_text(json.dumps(rows))
    for data in (run.data, run.data, recipe.data):
        load_split(data, "train")
    assert capsys.readouterr().err.count(f"data.train: {file} has changed since the run learned it") == 1


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows, {**rows[0], "conversations": rows[0]["conversations"] * 2}],
        lambda rows: rows[::-1],
    ],
)
def test_other_rows_than_a_run_held_out_are_refused(
    recipe: Recipe, change: Callable[[list[Any]], list[Any]], split: str
) -> None:
    run, file = of_a_run(edited(recipe, ["data.validation=0.1", "data.test=20"])), Path(recipe.data.sources[0])
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match="not those that the run held out") as refused:
        load_split(run.data, split)
    assert "data.test: 20 of " in refused.value.where and "--data" in refused.value.fix


def test_of_an_older_run_it_is_said_that_what_it_held_out_is_not_known(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    for cut, told in ((recipe, ""), (edited(recipe, ["data.test=20"]), "data.test")):
        load_split(edited(cut, ["data.held_out=null"]).data, "train")
        assert told in (said := capsys.readouterr().err) and bool(said) == bool(told)


def test_a_recipe_that_is_written_keeps_its_shares(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1"]).with_absolute_paths()
    assert "validation: 0.1" in cut.to_yaml()


@pytest.mark.parametrize("amount", ["0", "-1", "true"])
def test_amounts_that_mean_nothing_are_refused(recipe: Recipe, amount: str) -> None:
    with pytest.raises(UserError, match="validation"):
        edited(recipe, [f"data.validation={amount}"])


def test_more_than_there_is_cannot_be_cut(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        load_split(edited(recipe, ["data.validation=100"]).data, "train")


def test_a_split_that_is_not_there_is_named_with_those_that_are(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no split 'test'") as refused:
        load_split(recipe.data, "test")
    assert "train" in str(refused.value)


@pytest.fixture
def source(data: Path) -> Data:
    return Data(train=str(data / "train.json"), test=str(data / "test.json"))


def test_every_split_is_its_own_file(source: Data) -> None:
    assert len(load_split(source, "train")) > len(load_split(source, "test")) > 0


@pytest.mark.parametrize("split", ["validation", "image_root"])
def test_a_split_that_the_recipe_lacks_is_named_with_those_that_it_has(source: Data, split: str) -> None:
    with pytest.raises(UserError, match=f"no split '{split}'") as caught:
        load_split(source, split)
    assert "train, test" in str(caught.value.fix)


def test_a_split_is_read_as_the_recipe_says(tmp_path: Path) -> None:
    lines = [{"q": "what ?", "a": 0, "o": ["x", "y"], "set": 7}, {"q": "what ?"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = Columns(question="q", answer="a", options="o")
    data = Data(
        train=str(tmp_path / "t.jsonl"),
        columns=columns,
        template="{options} {question}",
        task_field="set",
        on_bad_sample="skip",
    )
    [row] = load_split(data, "train")
    assert [turn["text"] for turn in row["turns"]] == ["A. x\nB. y what ?", "A"] and row["task"] == "7"


@pytest.fixture
def two(write_json: Callable[[str, Any], Path]) -> list[dict[str, Any]]:
    """Two sources: ten conversations, and twenty rows of plain columns."""
    spoken = [
        {"conversations": [{"from": "human", "value": f"a{index} ?"}, {"from": "gpt", "value": "red"}]}
        for index in range(10)
    ]
    table = [{"q": f"b{index} ?", "a": "blue"} for index in range(20)]
    return [
        {"path": str(write_json("spoken.json", spoken)), "task": "spoken"},
        {"path": str(write_json("table.json", table)), "columns": {"question": "q", "answer": "a"}},
    ]


def mixed(recipe: Recipe, parts: list[dict[str, Any]]) -> Recipe:
    return validate({**recipe.model_dump(), "data": {**recipe.data.model_dump(), "train": parts}}, "here")


def asked(recipe: Recipe) -> list[str]:
    return [row["turns"][0]["text"] for row in load_split(recipe.data, "train")]


def test_several_sources_are_one_data_set_each_read_in_its_own_way(recipe: Recipe, two: list[dict[str, Any]]) -> None:
    rows = load_split(mixed(recipe, two).data, "train")
    assert len(rows) == 30 and rows[0]["task"] == "spoken" and rows[29]["turns"][1]["text"] == "blue"


@pytest.mark.parametrize(("amount", "count"), [({"weight": 2}, 20), ({"weight": 0.5}, 5), ({"samples": 13}, 13)])
def test_a_source_comes_as_often_as_its_weight_says(
    recipe: Recipe, two: list[dict[str, Any]], amount: dict[str, Any], count: int
) -> None:
    both = mixed(recipe, [{**two[0], **amount}, two[1]])
    own = [question for question in asked(both) if question.startswith("a")]
    assert len(own) == count and len(set(own)) == min(count, 10) and own == asked(both)[:count]


def test_a_weight_that_leaves_nothing_is_refused(recipe: Recipe, two: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="leaves none of its 10 rows") as refused:
        asked(mixed(recipe, [{**two[0], "weight": 0.001}, two[1]]))
    assert "spoken.json" in refused.value.where


def test_a_mixture_is_cut_like_any_data(recipe: Recipe, two: list[dict[str, Any]]) -> None:
    cut = edited(mixed(recipe, two), ["data.validation=6"])
    assert len(questions(cut, "validation")) == 6 and not questions(cut, "validation") & questions(cut, "train")


@pytest.mark.parametrize("amount", [{"weight": 2}, {"weight": 2.5}, {"samples": 13}])
def test_a_row_that_comes_several_times_is_on_one_side(
    recipe: Recipe, two: list[dict[str, Any]], amount: dict[str, Any]
) -> None:
    whole = mixed(recipe, [{**two[0], **amount}, two[1]])
    cut = edited(whole, ["data.validation=6", "data.test=3"])
    held_out = [row["turns"][0]["text"] for split in ("validation", "test") for row in load_split(cut.data, split)]
    assert len(held_out) == len(set(held_out)) == 9
    assert asked(cut) == [question for question in asked(whole) if question not in held_out]


def test_a_mixture_is_written_with_absolute_paths_and_read_again(recipe: Recipe, two: list[dict[str, Any]]) -> None:
    written = mixed(recipe, two).with_absolute_paths()
    assert validate(yaml.safe_load(written.to_yaml()), "here") == written


@pytest.mark.parametrize(
    ("part", "words"), [({"weight": 1, "samples": 2}, "give one of them"), ({"path": "embedded"}, "comes alone")]
)
def test_mistakes_in_a_mixture_are_named_with_their_place(
    recipe: Recipe, two: list[dict[str, Any]], part: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        mixed(recipe, [two[1], {**two[0], **part}])
    assert "data.train[1]" in str(refused.value)


def test_a_part_of_one_task_has_no_tasks_of_answers(write_json: Callable[[str, Any], Path]) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    path = str(write_json("two.json", [{"conversations": turns, "task": ["x", "y"]}]))
    rows = load_split(Data.model_validate({"train": [{"path": path}, {"path": path, "task": "z"}]}), "train")
    assert rows["task"][:] == ["y", "z"] and rows["tasks"][:] == [["x", "y"], []]


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder whose card declares two configurations, of which one has a split for validation."""
    for name, answer, rows in (("a", "red", 3), ("b", "blue", 4), ("held", "green", 2)):
        lines = [json.dumps({"q": f"{name} {index} ?", "a": answer}) for index in range(rows)]
        (tmp_path / "set" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files:\n"
        "  - {split: train, path: b.jsonl}\n  - {split: validation, path: held.jsonl}\n---\n"
    )
    return tmp_path / "set"


QUESTIONS = {"question": "q", "answer": "a"}


def test_a_configuration_of_a_data_set_is_a_subset(recipe: Recipe, configured: Path) -> None:
    columns: dict[str, Any] = {"columns": QUESTIONS}
    parts = [{"subset": "one"}, {"name": "two"}]  # the words of the hub, and of `datasets`
    both = mixed(recipe, [{"path": str(configured), **columns, **part} for part in parts])
    answers = [row["turns"][1]["text"] for row in load_split(both.data, "train")]
    assert answers == ["red"] * 3 + ["blue"] * 4
    of_all = Data(train=str(configured), validation=str(configured), subset="two", columns=Columns(**QUESTIONS))
    assert [row["turns"][1]["text"] for row in load_split(of_all, "validation")] == ["green"] * 2


@pytest.mark.parametrize(("subset", "words"), [(None, "one.*two"), ("three", "one.*two")])
def test_a_subset_that_is_not_there_is_named_with_those_that_are(
    configured: Path, subset: str | None, words: str
) -> None:
    data = Data(train=str(configured), subset=subset, columns=Columns(**QUESTIONS))
    with pytest.raises(UserError, match=f"(?s){words}") as refused:
        load_split(data, "train")
    assert "subset" in refused.value.fix


def test_a_split_that_a_configuration_lacks_is_refused(configured: Path) -> None:
    data = Data(train=str(configured), validation=str(configured), subset="one", columns=Columns(**QUESTIONS))
    with pytest.raises(UserError, match="no split 'validation'"):
        load_split(data, "validation")


def test_a_file_has_no_subsets(source: Data) -> None:
    with pytest.raises(UserError, match="subsets"):
        load_split(source.model_copy(update={"subset": "one"}), "train")
