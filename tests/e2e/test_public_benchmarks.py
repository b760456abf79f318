"""Public benchmarks through lmms-eval itself, where it is installed (the extra `bench`); its data are made here."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image as Pillow

from qmixlora.data import IMAGE
from qmixlora.errors import UserError
from qmixlora.recipe import edited
from qmixlora.session import open_run
from tests.conftest import CommandLine

lmms_eval = pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval.evaluator")
lmms_tasks = pytest.importorskip("lmms_eval.tasks")
benchmarks = pytest.importorskip("qmixlora.evaluation.benchmarks")

ROOT = Path(__file__).parents[2]
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function own.image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXT = {"type": "text", "text": "what ?"}
OWN = "from PIL import Image\ndef image(row):\n    return [Image.open(row['image'])]\n"


@pytest.fixture(scope="module")
def evaluated(
    qmixlora: CommandLine, finished_run: Callable[[str], Path]
) -> tuple[Path, dict[bool, list[dict[str, Any]]]]:
    """A run, and what `qmixlora eval` has of its test split: with the adapter, and (True) of the backbone alone."""
    run = finished_run("mixlora")
    assert qmixlora("eval", run).code == 0 and qmixlora("eval", run, "--backbone").code == 0
    files = {False: "predictions.jsonl", True: "predictions-test-backbone.jsonl"}
    lines = {bare: (run / name).read_text(encoding="utf-8").splitlines() for bare, name in files.items()}
    return run, {bare: [json.loads(line) for line in own] for bare, own in lines.items()}


@pytest.fixture(scope="module")
def own_task(evaluated: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lmms-eval's format: the run's own test split."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": one["images"][0], "question": one["question"], "answer": one["references"][0]}
        for one in evaluated[1][False]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "own.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"), encoding="utf-8")
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tasks write files for a leaderboard to the working directory."""
    monkeypatch.chdir(tmp_path)


def evaluate(folder: Path, tasks: list[str], **arguments: object) -> dict[str, Any]:
    manager = lmms_tasks.TaskManager("ERROR", include_path=str(folder), include_defaults=False)
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    results: dict[str, Any] = lmms_eval.evaluator.simple_evaluate(
        "qmixlora", given, tasks=list(tasks), batch_size=3, task_manager=manager, log_samples=True, verbosity="ERROR"
    )
    return results


@pytest.mark.parametrize("bare", [False, True])
def test_lmms_eval_is_given_the_answers_of_eval(evaluated: Any, own_task: Path, bare: bool) -> None:
    run, predictions = evaluated
    results = evaluate(own_task, ["own"], run=run, backbone=bare)
    answers = [sample["resps"][0][0] for sample in sorted(results["samples"]["own"], key=lambda one: one["doc_id"])]
    assert answers == [one["answer"].strip() for one in predictions[bare]]
    right = [one["answer"].strip() == one["references"][0] for one in predictions[bare]]
    assert results["results"]["own"]["exact_match,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.long
@pytest.mark.parametrize("form", ["lora", "merged"])
def test_lmms_eval_takes_exports_as_it_takes_runs(
    qmixlora: CommandLine, evaluated: Any, own_task: Path, tmp_path: Path, form: str
) -> None:
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    made = qmixlora("export", run, "--task", "digit", "--as", form, "--polish", "0", "--no-fingerprint")
    assert made.code == 0, made.stderr
    results = evaluate(own_task, ["own"], run=run / "exports" / f"digit-{form}")
    assert len(results["samples"]["own"]) == len(evaluated[1][False])


HUB = {  # task -> columns of the data set on the hub, as lmms-eval's files and ours read them
    "mme": {"category": "existence", "question": "is there a cat ?", "answer": "Yes", "question_id": "1.png"},
    "pope": {"category": "random", "question": "is there a cat ?", "answer": "yes", "question_id": "1", "id": "1"},
    "textvqa_val": {"question": "what does it say ?", "answers": ["one"] * 10, "question_id": 1, "ocr_tokens": ["one"]},
    "cifar10": {"label": 3},
    "cifar100": {"fine_label": 3, "coarse_label": 0},
    "mnist": {"label": 3},
    "vsr": {"image": "here.png", "caption": "the cat is left of the dog", "label": 1},
    "snli_ve": {"Flickr30K_ID": "here", "sentence2": "a cat", "gold_label": "neutral"},
}


@pytest.fixture(scope="module")
def paper_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task files that the paper's sets are evaluated by, each on two rows of its data set's columns."""
    folder = tmp_path_factory.mktemp("paper")
    Pillow.new("RGB", (32, 32), "red").save(folder / "here.png")
    Pillow.new("RGB", (32, 32), "red").save(folder / "here.jpg")
    own = {path.stem: path for path in (ROOT / "benchmarks" / "paper").glob("[!_]*.yaml")}
    theirs = Path(lmms_eval.__file__).parent / "tasks"
    files = own | {name: theirs / name / f"{name}.yaml" for name in ("mme", "pope")}
    files["textvqa_val"] = theirs / "textvqa" / "textvqa_val.yaml"
    assert files.keys() == HUB.keys()
    for name, file in files.items():
        row = dict(HUB[name])
        if name not in ("vsr", "snli_ve"):
            row["img" if name.startswith("cifar") else "image"] = Pillow.new("RGB", (32, 32), "red")
        (folder / name).mkdir()
        split = "validation" if name == "textvqa_val" else "test"
        Dataset.from_list([row] * 2).to_parquet(folder / name / f"{split}.parquet")
        (folder / f"{name}.yaml").write_text(
            f"include: {file}\ndataset_path: {folder / name}\ndataset_name: null\ndataset_kwargs: null\n"
        )
    return folder


def test_every_set_of_the_paper_is_evaluated_by_its_task_file(
    evaluated: Any, paper_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("COCO_IMAGES", "FLICKR30K_IMAGES"):
        monkeypatch.setenv(variable, str(paper_tasks))
    results = evaluate(paper_tasks, list(HUB), run=evaluated[0])
    assert results["results"].keys() == HUB.keys()
    for name, samples in results["samples"].items():
        assert len(samples) == 2 and isinstance(samples[0]["resps"][0][0], str), name


def test_every_command_of_lmms_eval_in_the_pages_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    lines = {line for page in pages for line in re.findall(r"^lmms-eval --.*$", page, re.MULTILINE)}
    assert len(lines) == 5
    there = set(lmms_tasks.TaskManager("ERROR", include_path=str(ROOT / "benchmarks" / "paper")).all_tasks)
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        _, given = pytest.importorskip("lmms_eval.__main__").parse_eval_args()
        assert given.model == "qmixlora" and set(given.tasks.split(",")) <= there
        inspect.signature(benchmarks.BenchmarkedRun).bind(**lmms_eval.utils.simple_parse_args_string(given.model_args))


def test_what_a_run_cannot_answer_is_refused_by_name(evaluated: Any) -> None:
    run = open_run(evaluated[0])
    picture = Pillow.new("RGB", (8, 8))
    row = benchmarks.conversation([{"role": "user", "content": [{"type": "image", "url": picture}, TEXT, TEXT]}], run)
    assert row["turns"][0]["text"] == f"{IMAGE}\nwhat ?\nwhat ?" and len(row["images"]) == 1
    with pytest.raises(UserError, match="no video"):
        benchmarks.conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], run)
    small = replace(run, recipe=edited(run.recipe, ["data.max_pixels=63"]))
    with pytest.raises(UserError, match="pixels, over data"):
        benchmarks.conversation([{"role": "user", "content": [{"type": "image", "url": picture}]}], small)
    model = benchmarks.BenchmarkedRun(str(evaluated[0]))
    with pytest.raises(UserError, match="no log-likelihoods"):
        model.loglikelihood([])


def test_an_answer_ends_where_the_task_says(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = benchmarks.BenchmarkedRun(str(evaluated[0]))
    row = benchmarks.conversation([{"role": "user", "content": [TEXT]}], model.session)
    [answer] = model._answers([row], {"max_new_tokens": 4})
    [first] = model._answers([row], {"max_new_tokens": 1})
    assert len(first) < len(answer)
    end = answer.removeprefix(first).split()[0]
    assert model._answers([row], {"max_new_tokens": 4, "until": ["\n\n", end]}) == [answer.partition(end)[0].strip()]
