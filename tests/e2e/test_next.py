"""What a command says comes next, and what it says of a folder or an option that is not for it: advice that works."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from qmixlora.cli.ending import say_next_of
from rich.console import Console

from qmixlora.chat import Chat
from qmixlora.errors import UserError
from qmixlora.mixlora import MixLoraConfig
from qmixlora.session import open_run
from tests.conftest import CommandLine

FinishedRun = Callable[[str], Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run by hand, as far as the command line looks before it reads."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "history.jsonl"):
        (folder / name).touch()
    return folder


@pytest.fixture
def export(run: Path) -> Path:
    return made(run, "a-lora", "adapter_config.json")


def made(run: Path, name: str, file: str) -> Path:
    """An export of a run by hand, with a file of its form."""
    folder = run / "exports" / name
    folder.mkdir(parents=True)
    for own in ("recipe.yaml", "fidelity.json", file):
        (folder / own).touch()
    return folder


def next_of(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=500)
    say_next_of(console, folder)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "words", [("export", "F", "--all"), ("report", "F"), ("inspect", "F", "--routing"), ("train", "F", "--resume")]
)
def test_an_export_is_not_taken_for_a_run(
    qmixlora: CommandLine, run: Path, export: Path, words: tuple[str, ...]
) -> None:
    done = qmixlora(*(export if word == "F" else word for word in words))
    assert done.code == 2 and "the folder of an export, not of a run" in done.stderr, done.stderr
    assert f"Did you mean {run}?" in done.stderr and not (export / "exports").exists()


def test_an_interrupted_run_is_gone_on_with(run: Path) -> None:
    assert f"train {run} --resume" in next_of(run)
    with pytest.raises(UserError, match=r"not finished.*(\n.*)+--resume"):
        open_run(run)


def test_an_export_that_llama_cpp_alone_opens_is_not_offered_to_chat(run: Path) -> None:
    (run / "adapter").mkdir()
    (run / "evaluation.json").touch()
    gguf = made(run, "a-gguf", "a.gguf")
    assert f"serve-files {run} --for llama-server" in next_of(run)
    with pytest.raises(UserError, match=r"a file for llama\.cpp.*(\n.*)+serve-files"):
        open_run(gguf)
    lora = made(run, "b-lora", "adapter_config.json")
    assert f"chat {lora} " in next_of(run)


def test_a_folder_is_no_recipe(qmixlora: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "my.yaml").touch()
    done = qmixlora("train", tmp_path / "folder")
    assert done.code == 2 and f"Did you mean {tmp_path / 'folder' / 'my.yaml'}?" in done.stderr
    assert "shipped recipes: " not in done.stderr


def test_where_no_run_is_there_is_nothing_to_remove(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("train", recipe_file, "--resume")
    assert done.code == 2 and "Train without --resume." in done.stderr and "Remove" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval", "RUN", "--data", "FILE", "--split", "validation"), "--data and --split do not go together"),
        (("eval", "RUN", "--data", "FOLDER"), "This is a folder, not a file."),
        (("doctor", "--model", "M", "--data", "D"), "--data is of --nf4"),
        (("doctor", "--model", "M", "--over", "0.2"), "--over is of --nf4"),
        (("doctor", "--model", "M", "--nf4", "--samples", "2"), "--samples is of --data"),
        (("doctor", "--data", "D"), "where: --data"),
        (("export", "RUN", "--all", "--base", "original"), "--base is of --as merged"),
        (("export", "RUN", "--all", "--as", "merged", "--projector", "adapter"), "--projector is of --as lora"),
        (("export", "RUN", "--as", "live-gguf", "--projector-rank", "2"), "--projector-rank is of --as lora"),
        (("inspect", "RUN", "--batches", "2"), "--batches is of --interference"),
        (("inspect", "RUN", "--routing", "--split", "test"), "--split is of --interference"),
        (("inspect", "RUN", "--routing", "--samples", "2"), "--samples is of the samples"),
        (("inspect", "RUN", "--interference", "data.max_length=9"), "data.max_length=9 is of the samples"),
        (("check", "RUN", "--dtype", "float32"), "--dtype is of --adapter"),
        (("check", "RUN", "--name", "N"), "--name is of --url or --llama-server"),
        (("check", "RUN", "--url", "U", "--base", "B"), "--base is of --adapter or --peft"),
        (("chat", "RUN", "--prompt", ""), "nothing to ask"),
        (("chat", "RUN", "--web", "--no-history"), "--web and --no-history do not go together"),
        (("check", "RUN", "--url", "U", "--peft", "--transformers"), "--url and --peft and --transformers do not"),
        (("plan", "tiny-cpu", "--card", "C", "--vram", "8"), "--card and --vram do not go together"),
    ],
)
def test_an_option_is_not_left_out_in_silence(
    qmixlora: CommandLine, run: Path, words: tuple[str, ...], told: str
) -> None:
    paths = {"RUN": run, "FILE": run / "history.jsonl", "FOLDER": run}
    done = qmixlora(*(paths.get(word, word) for word in words))
    assert done.code == 2 and told in done.stderr, done.stderr


def test_a_chat_says_what_a_task_is_for(finished_run: FinishedRun, tmp_path: Path) -> None:
    chat = Chat(finished_run("mixlora"), None, None, lambda text: None)
    assert chat.say("/task digit") == "Task: digit. (Nothing is routed on it.)"
    chat.speakers.mixture = MixLoraConfig(route_on="task", tasks=["color", "digit"])
    assert chat.say("/task digit") == "Task: digit."
    assert chat.say("/task nope") == "Task: nope. It is none of color, digit, whose mean is taken."
    with pytest.raises(UserError, match=r"Did you mean .*red\.png") as error:
        (tmp_path / "red.png").touch()
        chat.say(f"/image {tmp_path / 'rad.png'}")
    assert "image_root" not in str(error.value)
    with pytest.raises(UserError, match="home directory"):
        chat.say("/image ~no-such-user/red.png")
    assert chat.image is None


def test_names_of_recipes_are_whole_in_a_narrow_terminal(
    qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [row["name"] for row in json.loads(qmixlora("recipes", "list", "--vram", "8", "--json").stdout)]
    monkeypatch.setattr("qmixlora.cli.recipes.Console", partial(Console, width=40))
    lines = qmixlora("recipes", "list", "--vram", "8").stdout.splitlines()
    edge = next(line.index("samples") for line in lines if "samples" in line)
    shown = "".join(line[:edge].strip() for line in lines)
    assert len(names) > 9 and all(name in shown for name in names)
