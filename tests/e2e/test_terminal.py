"""The terminal: a typo is told at once, a chat does what its lines ask for, and shells complete."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from qmixlora.cli import quiet

from tests.conftest import CommandLine

FinishedRun = Callable[[str], Path]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RUN"],
        ["chat", "RUN"],
        ["export", "RUN", "--all"],
        ["report", "RUN"],
        ["compare", "RUN", "other"],
        ["inspect", "RUN", "--routing"],
        ["train", "RUN.yaml"],
        ["plan", "RUN.yaml"],
        ["data", "RUN.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_typo_in_a_path_is_told_before_anything_heavy_is_imported(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "my-runs").mkdir()
    words = [word.replace("RUN", str(tmp_path / "my-rnus")) for word in arguments]
    script = (
        f"import sys\nfrom qmixlora.cli.main import run\nsys.argv = ['qmixlora', *{words!r}]\n"
        "try:\n    run()\nexcept SystemExit as end:\n    print(end.code, {'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()", done.stderr
    assert "my-rnus" in done.stderr and ("my-runs?" in done.stderr or ".yaml" in arguments[1])


def test_a_chat_does_what_its_lines_ask_for(qmixlora: CommandLine, finished_run: FinishedRun, image: Path) -> None:
    lines = ["/routing", "what digit is written ?", f"/image {image}", "how big is the circle ?", "/routing"]
    lines += ["/task digit", "/export nothing", "/export run", "/jump", "/new", "/help", ""]
    done = qmixlora("chat", finished_run("mixlora"), stdin="\n".join(lines))
    assert done.code == 0, done.stderr
    for told in (
        "Nothing was asked yet.",
        "No image: it answers from the text alone",
        f"A new conversation about {image}",
        "Factors of pool A for the last question, mean of 14 layers",
        "Task: digit.",
        "There is no export 'nothing'",
        "Now run; the conversation goes on.",
        "There is no command /jump",
        "A new conversation.\n",
        "/routing (the factors that worked)",
    ):
        assert told in done.stdout, told


def test_an_image_that_is_gone_does_not_end_a_chat(
    qmixlora: CommandLine, finished_run: FinishedRun, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(*arguments: object, **options: object) -> list[str]:
        shown.unlink()
        return ["yes"]

    shown = Path(shutil.copy(image, tmp_path))
    monkeypatch.setattr("qmixlora.chat.dialogue.generate_answers", answered)
    done = qmixlora("chat", finished_run("lora"), "--image", shown, "--no-history", stdin="what ?\n/help\n\n")
    assert done.code == 0 and "image is missing" in done.stdout and "/help (this)" in done.stdout, done.stderr


def test_an_empty_answer_says_so(
    qmixlora: CommandLine, finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmixlora.chat.dialogue.generate_answers", lambda *arguments, **options: [" "])
    done = qmixlora("chat", finished_run("lora"), "--prompt", "what ?")
    assert "The model ended its answer at once." in done.stdout


@pytest.mark.long
def test_a_command_ends_with_the_one_that_comes_next(
    qmixlora: CommandLine, copied_run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    without_test = re.sub("^  test: .*$", "  test: null", (copied_run / "recipe.yaml").read_text("utf-8"), flags=re.M)
    (copied_run / "recipe.yaml").write_text(without_test, encoding="utf-8")
    run, made = copied_run, tmp_path / "my.yaml"
    for file in run.glob("evaluation*.json"):  # of other tests
        file.unlink()
    shutil.rmtree(run / "exports", ignore_errors=True)
    for words, told in (  # in the order in which one types them
        (("recipes", "list", "--vram", "6"), "qmixlora recipes copy NAME my.yaml ("),
        (("recipes", "copy", "tiny-cpu", made), f"Written: {made}.\nNext: qmixlora data {made} ("),
        (("data", recipe_file), f"qmixlora plan {recipe_file}\n"),
        (("report", run), f"Report: {run / 'report.html'}\nNext: qmixlora eval {run} ("),
        (("eval", run), f"qmixlora export {run} --all (the first wrong answers: qmixlora eval {run} --wrong 5)"),
        (("inspect", run), f"qmixlora inspect {run} --routing ("),
    ):
        done = qmixlora(*words)
        assert done.code == 0, done.stderr
        assert told in done.stdout and done.stdout.splitlines()[-1].startswith("Next: "), (words, done.stdout)
        if words[0] == "eval":  # the recipe holds nothing out
            assert done.stdout.startswith(f"{run}, split train (not held out: trained on)\n")
    assert "[[what is learned]], <<what is routed on>>" in done.stdout  # nothing is told by colour alone
    assert done.stdout.count("[[") == done.stdout.count("]]") == 4


def test_a_recipe_without_a_card_is_listed_by_its_peak(qmixlora: CommandLine) -> None:
    assert "paper-llava" not in qmixlora("recipes", "list", "--vram", "12").stdout
    assert "paper-llava" in qmixlora("recipes", "list", "--vram", "16").stdout


def test_shells_complete_the_verbs(qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in qmixlora("--help").stdout
    monkeypatch.setenv("_QMIXLORA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "qmixlora re")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert qmixlora().stdout.split() == ["report", "recipes"]


@pytest.mark.parametrize(("proxy", "offline"), [(None, "1"), ("http://127.0.0.1:9", None)])
def test_without_a_network_the_hub_is_not_asked_again_and_again(
    proxy: str | None, offline: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(host: str, port: object) -> None:
        raise socket.gaierror(-2, host)

    for name in ("HF_HUB_OFFLINE", *(name for name in os.environ if name.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    quiet.offline_without_network()
    assert os.environ.get("HF_HUB_OFFLINE") == offline
