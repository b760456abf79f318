"""The picker among a run's exports: fitted on its instructions, read without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import ByT5Tokenizer

from qmixlora.data import IMAGE, Collator, Conversation, Turn, load_split
from qmixlora.export import Request, export
from qmixlora.export.job import Job
from qmixlora.export.picker import discriminant, fit_picker, make_picker, questions_of
from qmixlora.serving.pick import Picker
from qmixlora.session import open_tuned_run
from tests.conftest import CommandLine

from .helpers import QUIET, TASKS, recipe_of

WITHOUT_TORCH = """
import json, sys
from qmixlora.serving.pick import Picker
from pathlib import Path
print(json.dumps(Picker(Path(sys.argv[1])).pick(sys.argv[2]).task))
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def exports(train_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exports of two tasks."""
    run = Path(shutil.copytree(train_once(), tmp_path_factory.mktemp("picked") / "run"))
    export(run, Request(tasks=TASKS, fingerprint=False), QUIET)
    return run / "exports"


def test_every_instruction_of_the_test_split_is_given_to_its_own_task(exports: Path) -> None:
    picker = Picker(exports / "picker")
    rows = [row for row in load_split(recipe_of(exports.parent).data, "test") if row["task"] in TASKS]
    picks = [picker.pick(row["turns"][0]["text"].replace(IMAGE, "")) for row in rows]
    assert rows and [own.task for own in picks] == [row["task"] for row in rows]
    assert all((exports / f"{own.name}-lora").is_dir() and own.sure > 0.2 for own in picks)


def test_an_instruction_between_two_tasks_is_unsure_and_unlike_those_of_training(exports: Path) -> None:
    picker = Picker(exports / "picker")
    (color, count) = (picker.pick(text) for text in ("what color is the circle ?", "how many red shapes are there ?"))
    other = picker.pick("what color is the circle ? how many red shapes are there ?")
    assert not other.familiar and other.sure < min(color.sure, count.sure) / 2


MANY = {
    "color": [f"what color is the {shape} ?" for shape in ("circle", "square", "triangle", "shape")],
    "count": [f"how many {color} shapes are there ?" for color in ("red", "green", "blue", "yellow")],
    "digit": ["what digit is written ?", "what digit is it ?"],
    "shape": ["what shape is red ?", "what shape is it ?"],
}
ONE = {task: own[:1] for task, own in MANY.items()}


@pytest.mark.parametrize(
    "asked",
    [
        ONE,
        MANY,
        {**MANY, "count": ONE["count"]},
        {task: [f" \n{text.replace(' ', chr(9))}\n\n" for text in own] for task, own in MANY.items()},
        {**ONE, "hue": ONE["color"]},
    ],
    ids=["one wording each", "many", "one of one task", "white space", "the same words"],
)
def test_every_instruction_of_the_training_is_familiar(
    exports: Path, tmp_path: Path, asked: dict[str, list[str]]
) -> None:
    """And none that is in other words."""
    session = open_tuned_run(exports.parent)
    assert isinstance(session.collator, Collator)
    rows = [conversation(text, task) for task, own in asked.items() for text in own]
    picker = fit_picker(
        session, session.collator.processor.tokenizer, Dataset.from_list(rows), {task: task for task in asked}
    )
    assert picker is not None
    picker.write(tmp_path / "picker")
    client = Picker(tmp_path / "picker")
    assert all(client.pick(text).familiar for own in asked.values() for text in own)
    assert not any(client.pick(f"{text} red triangle red triangle").familiar for own in asked.values() for text in own)


def conversation(question: str, task: str) -> Conversation:
    turns: list[Turn] = [{"role": "user", "text": question}, {"role": "assistant", "text": "x"}]
    return {"turns": turns, "images": [], "task": task}


def test_the_rows_of_a_picker_are_the_projected_embeddings_of_the_run(exports: Path) -> None:
    """Distances between tokens' rows are linear in those between their embeddings."""
    embeddings_VD = open_tuned_run(exports.parent).backbone.get_input_embeddings().weight.detach().double()
    tokens_VK = torch.from_numpy(Picker(exports / "picker").tokens_VK.copy()).double()
    wide_VD = torch.cat([embeddings_VD, torch.ones(len(embeddings_VD), 1).double()], dim=1)
    fit = torch.linalg.lstsq(wide_VD, tokens_VK, driver="gelsd").solution
    torch.testing.assert_close(wide_VD @ fit, tokens_VK, atol=1e-5, rtol=1e-4)


def test_the_exported_client_and_the_package_need_no_torch(exports: Path) -> None:
    instruction = "how many green shapes are there ?"
    script = [sys.executable, "-c", WITHOUT_TORCH, str(exports / "picker"), instruction]
    for command in (script, [sys.executable, "-I", str(exports / "picker" / "pick.py"), instruction]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said if isinstance(said, str) else said["task"]) == "count"


def test_the_command_names_the_folder_of_the_export(exports: Path, qmixlora: CommandLine) -> None:
    for folder in (exports, exports.parent):
        said = json.loads(qmixlora("pick", folder, "what color is the circle ?", "--json").stdout)
        assert said["task"] == said["name"] == "color" and said["exports"] == [str(exports / "color-lora")]
    told = qmixlora("pick", exports, "what color is the circle ?").stdout
    assert "color, sure" in told and f"Next: qmixlora chat {exports / 'color-lora'} " in told


def test_an_export_that_llama_cpp_alone_opens_is_not_offered_to_chat(
    exports: Path, qmixlora: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(exports / "picker", tmp_path / "picker")
    (tmp_path / "color-gguf").mkdir()
    told = qmixlora("pick", tmp_path, "what color is the circle ?").stdout
    assert told.splitlines()[-1].startswith(f"Next: qmixlora serve-files {tmp_path} --for llama-server")


def test_a_folder_without_a_picker_and_an_empty_instruction_are_mistakes(
    exports: Path, qmixlora: CommandLine, tmp_path: Path
) -> None:
    missing = qmixlora("pick", tmp_path, "what color is the circle ?")
    assert missing.code == 2 and "There is no picker" in missing.stderr
    assert qmixlora("pick", exports, " ").code == 2


def test_a_tokenizer_that_the_client_cannot_read_is_said(exports: Path) -> None:
    """ByT5's is Python code, and has no tokenizer.json."""
    session = open_tuned_run(exports.parent)
    processor = copy(session.collator.processor)
    processor.tokenizer, told = ByT5Tokenizer(), StringIO()
    job = Job(
        exports.parent, session.recipe, Request(), Console(file=told), replace(session.collator, processor=processor)
    )
    assert make_picker(job, session, ()) is None
    assert "No picker: ByT5Tokenizer" in told.getvalue()


def test_a_task_with_one_instruction_has_a_place_in_the_discriminant() -> None:
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(20, 6, generator=generator).double() + torch.eye(6)[0].double() * 8
    one = torch.eye(6)[1:2].double() * 8
    center_D, fit_DK = discriminant([many, one])
    assert fit_DK.shape == (6, 1)
    placed = ((torch.cat([many, one]) - center_D) @ fit_DK)[:, 0]
    assert (placed[:-1].sign() != placed[-1].sign()).all()


def test_each_answer_of_a_conversation_gives_its_own_question_to_its_own_task() -> None:
    turns: list[Turn] = [
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": f"{IMAGE}\nwhat color ?"},
        {"role": "assistant", "text": "red"},
        {"role": "user", "text": "how many ?"},
        {"role": "assistant", "text": "two"},
    ]
    row: Conversation = {"turns": turns, "images": [], "task": "count"}
    assert list(questions_of(row)) == [("count", "how many ?")]
    both: Conversation = {**row, "tasks": ["color", "count"]}
    assert set(questions_of(both)) == {("color", "what color ?"), ("count", "how many ?")}


def test_tasks_that_are_asked_for_in_the_same_words_have_one_place() -> None:
    same = torch.ones(1, 6).double()
    center_D, fit_DK = discriminant([same, same])
    assert torch.equal((same - center_D) @ fit_DK, torch.zeros(1, 1).double())
