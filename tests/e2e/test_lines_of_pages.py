"""Every command line of README and pages, typed as it stands there, on a run of two tasks and a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine
from tests.guard.test_commands import COMMANDS, ROOT

LINES = sorted({command.removeprefix("qmixlora ") for _, command in COMMANDS if command.startswith("qmixlora ")})
NOT_HERE = {  # a line: why it is not typed here
    r"demo.*": "minutes; tests/e2e/test_demonstrations.py runs it small, `make release-check` the whole",
    r"\S+|export RUN": "the name of a verb in a sentence",
    r".*(--url|--llama-server) .*": "a server; tests/unit/serving asks real ones of its own",
    r".*--web.*": "a server; tests/e2e/test_chat_page.py",
    r".*--as gguf": "the extra gguf; tests/unit/export/test_gguf_forms.py",
    r"(export .*--as live-gguf|route .*)": "the extra gguf, adapter.router=model; tests/unit/export/test_gguf_forms.py",
    r".*--processes 2": "two processes; tests/e2e/test_scaling.py",
    r"plan .*--probe": "a GPU; tests/unit/training/test_probe.py runs it on a CPU",
    r"plan (--model Qwen|paper-llava).*": "half a minute of planning; tests/e2e/test_plans.py and tests/unit/memory",
    r"train paper-llava.*": "an 80 GB card for hours; tests/e2e/test_paper.py resolves each",
    r"recipes check": "minutes; tests/unit/memory/test_check.py plans every recipe",
    r"check --adapter DIR --base MODEL": "an adapter of another tool; tests/unit/serving/test_check.py",
}
FRESH = "FRESH"  # a new name in every line
READ_AS = (  # what a line names, and what there is of it here; all of them in turn
    (r"^(recipes copy \S+|new .*--out) my\.yaml$", r"\1 FRESH.yaml"),
    (r"^(new (?!.*--out).*)$", r"\1 --out FRESH.yaml"),
    (r"^train (my\.yaml|RECIPE)(?!.*--dry-run)", r"train my.yaml train.output=FRESH"),
    (r"--model (M|Qwen/\S+)", "--model model"),
    (r"--data (D|data/train\.json)", "--data train.json"),
    (r"\bRUN RUN\b(?!/)", "runs/my runs/lora"),
    (r"\bruns/mine\b|\bRUN\b", "runs/my"),
    (r" exports/", " runs/my/exports/"),
    (r"\bcolor-lora\b", "counting-lora"),
    (r"--task a=0.7 --task b=0.3", "--task counting=0.7 --task reading=0.3"),
    (r"\bRECIPE\b", "my.yaml"),
    (r"\bFILE\b", "photo.png"),
)
SILENT = ("chat", "recipes show", "recipes schema", "train my.yaml --dry-run")  # that end with what was asked for
TASKS = {"digit": "counting", "color": "reading"}  # of the embedded data: as the pages call them


@pytest.fixture
def place(make_recipe: Callable[..., Recipe], data: Path, backbone: Path, tmp_path: Path) -> Path:
    """A folder with what the pages name: my.yaml, its data, a model, and a picture."""
    for split, source in {"train": "train", "validation": "train", "test": "test"}.items():  # four batches of each task
        rows = json.loads((data / f"{source}.json").read_text(encoding="utf-8"))
        own = [row | {"task": TASKS[row["task"]]} for row in rows if row["task"] in TASKS]
        (tmp_path / f"{split}.json").write_text(json.dumps(own), encoding="utf-8")
    shutil.copytree(data / "images", tmp_path / "images")
    shutil.copy(next((data / "images").glob("*.png")), tmp_path / "photo.png")
    (tmp_path / "model").symlink_to(backbone)
    recipe = make_recipe(adapter={"num_factors": 16, "r": 4}, train={"max_steps": 2, "output": "runs/my"})
    values = yaml.safe_load(recipe.to_yaml())
    values["data"].update(train="train.json", validation="validation.json", test="test.json")
    values["export"] = {"polish": 0, "samples": 2}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path


def is_here(line: str) -> bool:
    return line == "doctor" or not any(re.fullmatch(pattern, line) for pattern in NOT_HERE)


def order(line: str) -> int:
    """By what a line builds upon: the scores of a run, or its exports."""
    return 1 if line.startswith("export") else 0 if line.startswith("eval") and "/exports/" not in line else 2


def typed() -> list[str]:
    """The lines that are typed here, each as it is read, once."""
    lines = [line for line in LINES if is_here(line)]
    for pattern, there in READ_AS:
        lines = [re.sub(pattern, there, line) for line in lines]
    return sorted(dict.fromkeys(lines), key=order)


def test_every_reason_not_to_type_a_line_is_of_one() -> None:
    for pattern in NOT_HERE:
        assert any(re.fullmatch(pattern, line) for line in LINES), pattern
    for file in re.findall(r"tests/[\w/]+(?:\.py)?", " ".join(NOT_HERE.values())):
        assert (ROOT / file).exists(), file
    assert len(typed()) >= 50


@pytest.mark.long
def test_every_line_of_the_pages_runs_as_it_stands_there(qmixlora: CommandLine, place: Path) -> None:
    for words in ("train my.yaml", "train my.yaml adapter.method=lora train.output=runs/lora", "eval runs/lora"):
        done = qmixlora(*words.split(), cwd=place)
        assert done.code == 0, done.stderr
    for number, line in enumerate(typed()):
        line = line.replace(FRESH, f"new-{number}")
        done = qmixlora(*shlex.split(line), cwd=place, stdin="what digit ?\n\n")
        assert done.code == 0, (line, done.stdout, done.stderr)
        if "--json" in line:
            json.loads(done.stdout)
        elif not line.startswith(SILENT):
            assert "\nNext: " in f"\n{done.stdout}", (line, done.stdout)
