"""`qmixlora data` says what the data holds, and what of it a run could not use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path], tmp_path: Path) -> Path:
    """Forty samples of two tasks, one of them twice; two too long. The last two have an image."""
    Image.new("RGB", (600, 20), (200, 10, 10)).save(tmp_path / "p.png")
    rows = []
    for index in range(40):
        answer = " ".join(["red"] * (500 if index in (3, 30) else 1))
        turns = [{"from": "human", "value": f"what ? {max(index, 1)}"}, {"from": "gpt", "value": answer}]
        rows.append({"task": "t1" if index > 37 else "t0", "conversations": turns})
        if index > 37:
            rows[-1]["image"] = "p.png"
    data = {"train": str(write_json("data.json", rows)), "validation": None, "test": None, "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(make_recipe(data=data).to_yaml(), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_what_a_run_could_not_use_is_listed_and_exits_1(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file)
    assert done.code == 1
    for words in ("row 3 (", "row 30 (", "over data.max_length, 64", "'red' 100%", "Every answer ends in '<eos>'"):
        assert words in done.stdout
    assert done.stdout.endswith(f"qmixlora plan {recipe_file} data.on_bad_sample=skip (or fix the rows above)\n")


def test_the_same_as_json(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "data.validation=8", "--json")
    assert done.code == 0
    train, validation = json.loads(done.stdout)["splits"]
    assert train["samples"] == 32 and validation["samples"] == 8 and train["left_out"] == 0
    assert sum(train["tasks"].values()) == 32 and train["images"]["0"] >= 30


def test_samples_that_occur_twice_are_counted(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "--json")
    [train] = json.loads(done.stdout)["splits"]
    assert train["duplicates"] == 1


def test_the_share_of_padding_is_told_for_both_ways_to_make_batches(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "train.micro_batch_size=2", "--json")
    padding = json.loads(done.stdout)["splits"][0]["padding"]
    assert padding["batch_size"] == 2 and padding["shuffled"] > 0.1 > padding["by_length"]


def test_answers_are_told_by_task_with_their_shares(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "--json")
    answers = json.loads(done.stdout)["splits"][0]["answers"]["t0"]
    assert answers["different"] == 2 and answers["shares"]["red"] == pytest.approx(36 / 38)


def test_samples_are_shown_with_their_images_and_sizes(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "--show", "2")
    assert "p.png (600 x 20)" in done.stdout and "what ? 3" in done.stdout and "task t0" in done.stdout
    shown = json.loads(qmixlora("data", recipe_file, "data.max_length=1000", "--show", "2", "--json").stdout)["shown"]
    assert [sample["task"] for sample in shown] == ["t0", "t1"] and shown[1]["images"][0]["width"] == 600


def test_the_page_holds_all_that_it_shows(qmixlora: CommandLine, recipe_file: Path, tmp_path: Path) -> None:
    done = qmixlora("data", recipe_file, "data.on_bad_sample=skip", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert done.code == 1 and ("what ? 39" in page or "what ? 38" in page)
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"} and "over data.max_length, 64" in page


def test_html_in_the_data_is_text_on_the_page(
    qmixlora: CommandLine, recipe_file: Path, write_json: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "what <script>alert(1)</script> ?"}, {"from": "gpt", "value": "<b>red</b>"}]
    write_json("data.json", [{"task": "<i>", "conversations": turns}])
    qmixlora("data", recipe_file, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and not re.search("<script>|<b>red|<i>", page)


def test_a_run_stops_before_its_first_step_with_all_of_them(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("train", recipe_file)
    assert done.code == 2 and "2 samples cannot be used" in done.stderr and "row 30 (" in done.stderr


def test_a_run_tells_what_was_left_out_and_keeps_it(qmixlora: CommandLine, recipe_file: Path, tmp_path: Path) -> None:
    done = qmixlora("train", recipe_file, "data.on_bad_sample=skip", "data.validation=8", "train.max_steps=1")
    assert done.code == 0 and "2 of 32 samples left out" in done.stderr
    train, validation = json.loads((tmp_path / "run" / "survey.json").read_text(encoding="utf-8"))["splits"]
    assert train["left_out"] + validation["left_out"] == 2 and validation["split"] == "validation"
    assert train["tokens"]["largest"] <= 64 and sum(train["tasks"].values()) == train["samples"] - train["left_out"]
    assert train["reasons"] == {"A sample has N tokens, over data.max_length, N; samples are never cut.": 2}
