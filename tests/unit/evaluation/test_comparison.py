"""Two models on the same samples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmixlora.data import Conversation
from qmixlora.errors import UserError
from qmixlora.evaluation import Scores, score
from qmixlora.evaluation.comparison import compare
from qmixlora.recipe import validate


def row(task: str, question: str, answer: str) -> Conversation:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"task": task, "turns": turns, "images": []}


ROWS = [row("a", f"q{index}", "x") for index in range(100)] + [row("b", f"q{index}", "x") for index in range(100)]


def right_in(hits: int, rows: list[Conversation] = ROWS) -> Scores:
    """The scores of a model that knows the first answers of every task."""
    return score(rows, ["x" if index % 100 < hits else "y" for index in range(len(rows))], "test")


def test_a_difference_has_a_paired_interval() -> None:
    compared = compare({"one": right_in(80), "other": right_in(90), "same": right_in(80)})
    assert compared.means["other"].points == pytest.approx(0.1) and compared.means["other"].is_one
    assert compared.means["same"].points == 0 and not compared.means["same"].is_one
    assert compared.tasks["other"]["a"].points == pytest.approx(0.1)


def test_a_few_samples_more_are_no_difference() -> None:
    assert not compare({"one": right_in(80), "other": right_in(81)}).means["other"].is_one


@pytest.mark.parametrize(("samples", "is_one"), [(1, False), (2, False), (5, False), (6, True)])
def test_all_of_few_samples_are_a_difference_from_six_on(samples: int, is_one: bool) -> None:
    rows = ROWS[:samples]
    compared = compare({"one": score(rows, ["x"] * samples, "test"), "other": score(rows, ["y"] * samples, "test")})
    assert compared.tasks["other"]["a"].points == compared.means["other"].points == -1
    assert compared.tasks["other"]["a"].is_one is compared.means["other"].is_one is is_one


def test_models_that_were_asked_something_else_are_not_compared() -> None:
    others = [row("a", "other", "x"), *ROWS[1:]]
    with pytest.raises(UserError, match=r"sample 0 is 'q0' for one, 'other' \(sample 0\) for two"):
        compare({"one": right_in(80), "two": right_in(80, others)})
    with pytest.raises(UserError, match="one has 200 answers, two 150"):
        compare({"one": right_in(80), "two": right_in(80, ROWS[:150])})


def test_scores_of_other_tolerances_are_not_compared() -> None:
    """But by `number` alone, which has one, and where both are known."""

    def within(tolerance: float, metric: str = "number") -> Scores:
        recipe = {"data": {"train": "-", "metrics": {"*": metric}, "tolerance": tolerance}, "model": {"id": "-"}}
        return score([row("a", "q", "100")] * 6, ["105"] * 6, "test", validate(recipe, "test").data)

    with pytest.raises(UserError, match=r"number \(tolerance 0\) for one and by number \(tolerance 0.1\) for two"):
        compare({"one": within(0), "two": within(0.1)})
    assert compare({"one": within(0, "exact"), "two": within(0.1, "exact")}).means["two"].points == 0
    unknown = {name: replace(own, tolerance=None) for name, own in within(0.1).tasks.items()}
    assert compare({"one": within(0.1), "older": replace(within(0.1), tasks=unknown)}).means["older"].points == 0


def test_an_export_is_compared_on_the_tasks_that_it_was_asked() -> None:
    compared = compare({"run": right_in(80), "export": right_in(90, ROWS[100:])})
    assert compared.scores["run"].tasks.keys() == compared.tasks["export"].keys() == {"b"}
    assert compared.means["export"].points == pytest.approx(0.1) and compared.left_out == ["a"]
    with pytest.raises(UserError, match="no task in common"):
        compare({"one": right_in(80, ROWS[:100]), "two": right_in(80, ROWS[100:])})


def test_an_export_of_tasks_that_alternate_is_compared_and_knows_its_rows() -> None:
    rows = [row("abc"[index % 3], f"q{index}", "x") for index in range(9)]
    numbers = [index for index in range(9) if index % 3]
    of_export = score([rows[index] for index in numbers], ["x"] * 6, "test", numbers=numbers)
    assert [one.row for one in of_export.predictions] == numbers
    compared = compare({"run": score(rows, ["y"] * 9, "test"), "export": of_export})
    assert compared.means["export"].points == 1 and compared.left_out == ["a"]


def test_the_same_questions_about_other_images_are_not_compared() -> None:
    """The same image in another place is the same."""

    def about(folder: str, key: str | None) -> Scores:
        scores = score(ROWS[:3], ["x"] * 3, "test")
        keys = None if key is None else [key]
        shown = [replace(one, images=[f"/{folder}/1.png"], image_keys=keys) for one in scores.predictions]
        return replace(scores, predictions=shown)

    with pytest.raises(UserError, match=r"sample 0, 'q0', shows other images for one \(/a/1.png\) than for two \(/b"):
        compare({"one": about("a", "01"), "two": about("b", "02")})
    assert compare({"one": about("a", "01"), "moved": about("b", "01"), "older": about("a", None)}).means


def test_the_comparison_in_json_has_all_scores_and_differences() -> None:
    written = compare({"one": right_in(80), "other": right_in(90)}).to_dict()
    assert written["scores"]["one"]["mean"] == 0.8
    assert written["differences"]["other"]["mean"]["points"] == pytest.approx(0.1)
    assert written["differences"]["other"]["tasks"].keys() == {"a", "b"}
    assert written["differences"]["other"]["tasks"]["a"].keys() == {"points", "interval", "p_value"}
