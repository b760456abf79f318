"""A mistake of the user is one message and exit 2; what stops a run leaves nothing that looks finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from qmixlora.cli import main
from qmixlora.cli.overrides import Verb
from typer.testing import CliRunner

from tests.conftest import CommandLine
from tests.disks import mounted


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["Did you mean 'learning_rate'?"]),
        ("data.train=none.json", ["no such data file", "none.json"]),
        ("model.id=/nowhere/model", ["Cannot load the model", "/nowhere/model"]),
        ("adapter.target_modules=[w_proj]", ["'w_proj'", "q_proj"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    done = qmixlora("train", recipe_file, override)
    assert done.code == 2 and done.stderr.startswith("qmixlora: ")
    for word in [*words, "where:"]:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "override", "words"),
    [
        (["export", "RUN"], "export.polish=0", "Use --polish"),
        (["chat", "RUN"], "train.max_new_tokens=9", "before training"),
        (["check", "RUN"], "data.max_length=9", "before training"),
        (["pick", "RUN", "what ?"], "adapter.r=8", "before training"),
        (["serve-files", "RUN", "--for", "vllm"], "data.max_pixels=9", "before training"),
        (["eval", "RUN"], "data.test=my.json", "before training"),
        (["report", "RUN"], "train.seed=9", "before training"),
        (["doctor"], "model.id=embedded", "before training"),
        (["recipes", "copy", "tiny-cpu"], "adapter.r=8", "before training"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_override_where_a_verb_takes_none_names_what_to_use(
    qmixlora: CommandLine, tmp_path: Path, verb: list[str], override: str, words: str
) -> None:
    done = qmixlora(*(str(tmp_path) if word == "RUN" else word for word in verb), override)
    assert done.code == 2 and "takes no overrides" in done.stderr, done.stderr
    assert f"where: {override}\n" in done.stderr and words in done.stderr


@pytest.mark.parametrize(("word", "out"), [("--out=~/a", "/home/me/a"), ("--out=a/~", "a/~")])
def test_the_home_folder_is_read_behind_an_options_name(monkeypatch: pytest.MonkeyPatch, word: str, out: str) -> None:
    """A shell reads `~` at the beginning of a word alone."""
    monkeypatch.setenv("HOME", "/home/me")
    app = typer.Typer()

    @app.command(cls=Verb)
    def verb(out: str = "") -> None:
        print(out)

    assert CliRunner().invoke(app, [word]).stdout == f"{out}\n"


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("https://example.com/a.png", ["not fetched", "https://example.com/a.png"]),
        ("gone.png", ["image is missing", "gone.png"]),
        ("large.png", ["300 x 200 = 60,000 pixels", "large.png", "data.max_pixels, 50,000"]),
    ],
)
def test_an_image_that_cannot_be_had_is_named_with_its_row(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, verb: str, image: str, words: list[str]
) -> None:
    Image.new("L", (300, 200)).save(tmp_path / "large.png")
    turns = [{"from": "human", "value": "<image> circle"}, {"from": "gpt", "value": "seven"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": image, "conversations": turns}]))
    samples = ["--samples", "1"] if verb == "inspect" else []
    done = qmixlora(verb, recipe_file, *samples, f"data.train={tmp_path / 'rows.json'}", "data.max_pixels=50000")
    assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
    for word in [*words, "row 0"]:
        assert word in done.stderr


def test_a_page_never_takes_the_place_of_a_folder(qmixlora: CommandLine, copied_run: Path, recipe_file: Path) -> None:
    pictures = copied_run.parent / "pictures"
    pictures.mkdir()
    (pictures / "one.png").touch()
    for verb in (["data", recipe_file, "--html"], ["report", copied_run, "--out"]):
        done = qmixlora(*verb, pictures)
        assert done.code == 2 and "There is a folder where a file would be written" in done.stderr, done.stderr
        done = qmixlora(*verb, copied_run.parent / "none" / "page.html")
        assert done.code == 2 and "There is no such folder" in done.stderr, done.stderr
    assert (pictures / "one.png").is_file() and not (copied_run.parent / "none").exists()


def test_a_folder_that_cannot_be_written_is_one_message(
    qmixlora: CommandLine, copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied_run / "exports").touch()  # a file in the folder's place: also for who may write everywhere
    (copied_run / "figures").touch()
    (copied_run / "report.html").mkdir()
    for verb, where in [
        (["export", copied_run, "--all"], "exports"),
        (["inspect", copied_run, "--routing"], "figures"),
        (["inspect", copied_run, "--interference"], "figures"),
        (["report", copied_run], "report.html"),
        (["demo", "--out", copied_run / "exports" / "demo"], "exports"),
    ]:
        done = qmixlora(*verb)
        assert done.code == 2 and done.stdout == "" and done.stderr.startswith("qmixlora: "), (verb, done)
        assert f"{copied_run / where}\n" in done.stderr, done.stderr
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied_run / "exports" / "cache"))
    done = qmixlora("data", "tiny-cpu")
    assert done.code == 2 and "XDG_CACHE_HOME" in done.stderr and "Traceback" not in done.stderr, done.stderr


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a shell runs it."""
    line = [sys.executable, "-c", "from qmixlora.cli.main import run; run()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


def test_a_process_ends_with_2_and_no_traceback(recipe_file: Path) -> None:
    done = command("train", recipe_file, "train.learning_rat=1")
    assert done.returncode == 2 and done.stderr.startswith("qmixlora: ") and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_mistake_is_told_without_words_of_the_libraries(copied_run: Path) -> None:
    for options in ((), ("--as", "live-gguf")):
        done = command("export", copied_run, *options)
        assert done.returncode == 2 and done.stderr.startswith("qmixlora: "), done.stderr
        assert done.stdout == ""


@pytest.mark.long
def test_a_process_that_trained_ends_with_0_and_our_own_words_alone(recipe_file: Path) -> None:
    done = command("train", recipe_file)
    assert done.returncode == 0 and "step     4/4" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "Loading weights" not in done.stderr + done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with mounted(tmp_path / "small", "size=64k") as small:
        yield small


def test_a_full_disk_leaves_nothing_that_looks_finished(
    qmixlora: CommandLine, recipe_file: Path, small_disk: Path
) -> None:
    done = qmixlora("train", recipe_file, f"train.output={small_disk / 'run'}")
    assert done.code == 2, done.stderr
    assert "disk is full" in done.stderr and str(small_disk) in done.stderr
    assert not (small_disk / "run" / "adapter").exists() and not (small_disk / "run" / "adapter.tmp").exists()


def test_nothing_is_searched_for_garbage_on_the_way_out() -> None:
    """Which takes two seconds once torch and transformers are there."""
    after = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import qmixlora.cli.main"
    done = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0."),
            "CUDA out of memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_memory_that_runs_out_is_one_message(
    qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def out_of_memory() -> None:
        raise error

    monkeypatch.setattr(main, "app", out_of_memory)
    ended = qmixlora("eval")
    assert ended.code == 2 and f"Memory ran out: {words}.\n" in ended.stderr
    assert "eval_batch_size" in ended.stderr and "Traceback" not in ended.stderr
