"""The report of a run, in a real browser: whole, quiet, and as wide as its window."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from qmixlora.errors import UserError
from qmixlora.evaluation import Prediction, Scores, TaskScore, write_results
from qmixlora.recipe import validate
from qmixlora.report import page as page_of_report
from qmixlora.report.charts import Curve, Score, draw_curves, draw_scores, smooth
from qmixlora.report.page import refresh_report, write_report
from tests.browser import CHROMIUM, Browser, browser
from tests.unit.report.records import NAMES, record_by_hand

LONG = "a_name_of_a_task_that_is_as_long_as_those_of_Vision-Flan+visual_question_answering"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder by hand, with every file that a report reads."""
    from qmixlora.mixlora.routing_record import FILE

    folder = tmp_path_factory.mktemp("report") / "run"
    folder.mkdir()
    recipe = validate({"model": {"id": "someone/model"}, "data": {"train": "train.json"}}, "test")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    logs = [
        {"step": s, "loss": 4 / s, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": s, "memory_gib": 8.5}
        for s in range(1, 700)
    ]
    lines = [*logs, {"step": 699, "eval_loss": 0.5, "seconds": 800}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (folder / "history.jsonl").write_text('{"event": "started", "data": "d1g3st", "versions": {"torch": "2"}}\n')
    record_by_hand(["s", LONG]).save(folder / FILE)
    split = {"split": "train", "samples": 3, "left_out": 1, "tasks": {LONG: 2}, "tokens": None}
    (folder / "survey.json").write_text(json.dumps({"splits": [split], "warnings": ["<b>careful</b>"]}))
    (folder / "plan.json").write_text('{"card_gib": 12.0, "peak_gib": 9.25}')
    means = {pool: [[1, -0.5], [None, 1]] for pool in "AB"}
    (folder / "interference.json").write_text(json.dumps({"tasks": ["s", LONG], "mean": means}))
    write_results(folder, scores(folder, right=2))
    write_results(folder, scores(folder, right=0), backbone=True)
    for form in ("lora", "merged"):
        export = folder / "exports" / f"s-{form}"
        export.mkdir(parents=True)
        fidelity = {"form": form, "folder": str(export), "rank": 4, "polish_steps": 0, "update_error": {"mean": 0.9}}
        fidelity |= {"split": "test", "exact_match": {"live": 0.8, form: 0.4}, "agreement": {form: 0.5}}
        (export / "fidelity.json").write_text(json.dumps(fidelity))
    (folder / "exports" / "s-lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "/its/base"}')
    return folder


def scores(folder: Path, right: int) -> Scores:
    """Four answers, the first ones right; one has a picture, one had one, one has its bytes in the data."""
    Image.new("RGB", (3000, 2000), "red").save(folder / "red.png")
    images = [[str(folder / "red.png")], [str(folder / "gone.png")], [None], []]
    predictions = [
        Prediction(row, LONG, "<i>what</i> ?", images[row], ["red"], "red" if row < right else "", float(row < right))
        for row in range(4)
    ]
    return Scores("test", {LONG: TaskScore(right / 4, 4, "exact", (0.0, 0.9))}, predictions)


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    return write_report([made])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_a_report_holds_what_the_run_has_and_nothing_of_it_is_markup(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    for text in (
        "someone/model",
        "d1g3st",
        "torch 2",
        "&lt;i&gt;what",
        "&lt;b&gt;careful",
        "s-lora",
        "before",
        "after",
    ):
        assert text in html, text
    assert "<i>" not in html and "<b>careful" not in html
    assert html.count('class="chart"') == html.count("<summary>Numbers</summary>") > 10
    assert 'class="act"' in html and "gone.png" in html and "picture inside the data" in html


def test_exports_that_lose_alike_are_told_of_once_and_a_lora_is_used_on_its_own_base(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("polish it longer") == 1 and "In s-lora and s-merged: update error 0.90" in text
    assert "from_pretrained(&#x27;/its/base&#x27;)" in text and "vllm serve /its/base --enable-lora" in text


def test_what_serves_an_export_is_typed_as_it_stands(made: Path, tmp_path: Path) -> None:
    run = evaluated(tmp_path / "my runs" / "it's", made / "recipe.yaml", scores(made, right=3))
    folder = run / "exports" / "a=0.7+b=0.3-lora"
    folder.mkdir(parents=True)
    fidelity = json.loads((made / "exports" / "s-lora" / "fidelity.json").read_text(encoding="utf-8"))
    (folder / "fidelity.json").write_text(json.dumps(fidelity | {"folder": str(folder)}))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/my base", "revision": "v2"}')
    lines = unescape(write_report([run]).read_text(encoding="utf-8")).splitlines()
    start, check = (next(line for line in lines if line.startswith(f"# {verb}")) for verb in ("vllm", "qmixlora check"))
    *words, module = shlex.split(start.removeprefix("# "))
    own = ["vllm", "serve", "/my base", "--revision", "v2"]
    assert words == [*own, "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    assert any("from_pretrained('/my base', revision='v2')" in line for line in lines)
    assert json.loads(module) == {"name": folder.name, "path": str(folder)}
    assert shlex.split(check)[3] == str(folder)
    shutil.rmtree(folder)
    html = unescape(write_report([run]).read_text(encoding="utf-8"))
    for verb, options in (("eval", "--backbone"), ("export", "--all")):
        assert f"qmixlora {verb} {shlex.quote(str(run))} {options}" in html


def test_a_report_is_one_small_file_that_asks_for_nothing(page: Path, shown: Browser) -> None:
    assert page.stat().st_size < 3_000_000
    shown.asked.clear()
    shown.open(page, 390)
    assert {url for url in shown.asked if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert shown.said == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_fits_its_window_in_light_and_dark(page: Path, shown: Browser, width: int, dark: bool) -> None:
    shown.open(page, width, dark=dark)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    paper, ink = (shown.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (sum(map(int, paper[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))) == dark
    label = shown.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert label == ink and shown.said == []


def test_on_paper_the_numbers_of_every_chart_are_open(page: Path, shown: Browser) -> None:
    shown.open(page, 794)
    height = shown.evaluate("document.documentElement.scrollHeight")
    shown.open(page, 794, media="print")
    assert shown.evaluate("document.documentElement.scrollHeight") > height
    cut = "[...document.querySelectorAll('.tall')].filter(own => own.scrollHeight > own.clientHeight + 1).length"
    assert shown.evaluate(cut) == 0


def test_a_curve_of_one_step_is_a_dot() -> None:
    dot, line = (draw_curves("t", [Curve("c", [(4, 1.0), (last, 1.1)])], "GiB") for last in (4, 5))
    assert dot.count("<use") > line.count("<use")


def test_names_are_drawn_as_they_are_and_all_of_them_in_the_legend() -> None:
    first, second = (name.replace("\ud83d", "?") for name in NAMES)
    curves = draw_curves("t", [Curve(name, [(1, 1.0), (2, 2.0)]) for name in NAMES], "loss")
    scores = draw_scores("t", NAMES, {name: [Score(0.5, None)] * 2 for name in NAMES}, "")
    for drawn, times in ((curves, 1), (scores, 2)):  # in the legend, and of scores at an axis
        svg = drawn[: drawn.index("</svg>")]
        assert [svg.count(f">{name}<") for name in (first, second)] == [times, times]


def test_a_report_that_cannot_be_drawn_fails_no_command(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(records: object) -> str:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(page_of_report, "scores_section", fail)
    said = refresh_report(made)
    assert said.startswith("The report was not written: ZeroDivisionError: by zero") and str(made) in said


def test_two_runs_stand_side_by_side(made: Path, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "other", made / "recipe.yaml", scores(made, right=3))
    html = write_report([made, other], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "run and other" in html and "difference from run, paired by sample" in html
    assert re.search(r"<td>\+0.250</td><td>[+-][\d.]+\sto\s\+[\d.]+</td><td>(none|better)</td>", html)


def evaluated(folder: Path, recipe: Path, measured: Scores) -> Path:
    """The folder of a run of which nothing is there but its scores."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(recipe.read_bytes())
    write_results(folder, measured)
    return folder


def test_runs_of_one_name_are_told_apart_by_their_paths(made: Path, tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / name, made / "recipe.yaml", scores(made, right=3)) for name in ("a/run", "b/run", "c")]
    html = write_report(runs, tmp_path / "all.html").read_text(encoding="utf-8")
    assert "a/run and b/run and c" in html
    assert "<td>b/run</td><td>+0.000</td>" in html and "<td>c</td><td>+0.000</td>" in html  # differences from a/run
    with pytest.raises(UserError, match="named twice"):
        write_report([runs[0], tmp_path / "b" / ".." / "a" / "run"], tmp_path / "twice.html")


def test_runs_that_were_asked_other_splits_are_not_in_one_chart(made: Path, tmp_path: Path) -> None:
    asked = [replace(scores(made, right=right), split=split) for right, split in ((1, "test"), (2, "validation"))]
    runs = [evaluated(tmp_path / one.split, made / "recipe.yaml", one) for one in asked]
    html = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    for one in asked:
        chart = html[html.index(f"Score by task with 95 % intervals, split {one.split}</h3>") :]
        chart = chart[: chart.index("</details>")]
        assert f"<td>{one.mean:.3f}" in chart and chart.count(f">{one.split}<") == 1  # the head of its table
    assert "difference from" not in html and "qmixlora eval RUN --split test" in html


def test_a_folder_without_a_recipe_is_no_run_and_a_damaged_one_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report([tmp_path])
    assert refresh_report(tmp_path).startswith("The report was not written: This is not the folder of a run")


DAMAGED = {
    "survey.json": '{"splits": [{"split": "train", "left_out": 0, "tasks": {}}]}',
    "plan.json": '{"card_gib": "12"}',
    "interference.json": '{"tasks": ["s", "t"], "mean": {"A": [[1]]}}',
    "exports/a-lora/fidelity.json": '{"form": "lora", "folder": "x"}',
    "exports/b-lora/fidelity.json": "{",
    "exports/c-lora/fidelity.json": json.dumps(
        {"form": "lora", "folder": "c-lora", "rank": 4, "polish_steps": 0, "split": "test", "update_error": {"mean": 0}}
        | {"exact_match": {"live": 1}, "agreement": {"lora": 1}}
    ),
}
WHY = ("splits.0.samples: Field required", "card_gib: ", "mean is not of 2 x 2 values", "rank: Field required")


@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl"])
def test_damaged_scores_are_named(made: Path, tmp_path: Path, name: str) -> None:
    run = evaluated(tmp_path / "run", made / "recipe.yaml", scores(made, right=3))
    assert "Left out, since they are damaged" not in write_report([run]).read_text(encoding="utf-8")
    (run / name).write_text((run / name).read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert f"Left out, since they are damaged: {name} cannot be read" in write_report([run]).read_text(encoding="utf-8")


def test_damaged_files_are_left_out_and_named(made: Path, tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", made / "recipe.yaml", scores(made, right=3))
    for name, text in DAMAGED.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text, encoding="utf-8")
    (run / "history.jsonl").write_text('{"event": "started", "data": 1, "versions": []}\n', encoding="utf-8")
    html = write_report([run]).read_text(encoding="utf-8")
    told = html[html.index("Left out, since they are damaged") :]
    assert [
        name for name in (*DAMAGED, *WHY, "exact_match.lora is missing") if name not in told[: told.index("</p>")]
    ] == []
    for part in ("Data</h3>", "<h2>Interference", "c-lora</td>"):
        assert part not in html


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([float(n) for n in range(100)])[0] == 0.0 < smooth([float(n) for n in range(100)])[50] < 50
