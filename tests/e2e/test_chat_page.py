"""`qmixlora chat --web`: asked as its visitors ask, over its own address, and looked at in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmixlora.chat import Speakers, factors_at_work
from qmixlora.session import TunedSession
from tests.browser import CHROMIUM, browser
from tests.conftest import CommandLine

FinishedRun = Callable[[str], Path]
NAMES = ["run", "backbone", "color-lora"]


@pytest.fixture(scope="session")
def run_with_export(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose export is the plain LoRA of another one."""
    run = Path(shutil.copytree(finished_run("mixlora"), tmp_path_factory.mktemp("page") / "run"))
    export = run / "exports" / "color-lora"
    shutil.copytree(finished_run("lora") / "adapter", export)
    shutil.copyfile(finished_run("lora") / "recipe.yaml", export / "recipe.yaml")
    (export / "fidelity.json").touch()
    for name, file in {"base": "config.json", "color-gguf": "fidelity.json"}.items():
        (run / "exports" / name).mkdir()
        (run / "exports" / name / file).touch()
    return run


def test_the_speakers_are_the_run_its_backbone_and_its_exports(run_with_export: Path) -> None:
    assert Speakers(run_with_export).names == NAMES
    assert Speakers(run_with_export / "exports" / "color-lora").names == ["run", "backbone"]


def test_the_backbone_speaks_without_the_adapter_and_routes_nothing(run_with_export: Path) -> None:
    with Speakers(run_with_export).speaking("backbone") as session:
        assert isinstance(session, TunedSession) and factors_at_work(session) is None
        assert all(layer.disable_adapters for layer in session.model.base_model.mixlora_layers)


@pytest.mark.parametrize(("free", "kept"), [(0, ["color-lora"]), (2**50, ["run", "color-lora"])])
def test_models_stay_loaded_while_there_is_room_for_one_more(
    run_with_export: Path, monkeypatch: pytest.MonkeyPatch, free: int, kept: list[str]
) -> None:
    monkeypatch.setattr("qmixlora.chat.speakers.free_memory", lambda: free)
    speakers = Speakers(run_with_export)
    with speakers.speaking("color-lora"):
        assert list(speakers.sessions) == kept


def test_without_gradio_the_page_says_what_to_install(
    qmixlora: CommandLine, run_with_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = qmixlora("chat", "--web", run_with_export)
    assert done.code == 2 and "pip install 'qmixlora[web]'" in done.stderr


@pytest.fixture(scope="module")
def address(run_with_export: Path, image: Path) -> Iterator[str]:
    """Where the command line serves the page of the run; it ends by Ctrl-C."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "qmixlora.cli.main", "chat", "--web", run_with_export, "--image", image]
    paths = os.pathsep.join(sys.path)  # the tests' own processors are on it
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", line := process.stdout.readline())
            assert found, line
            yield found.group()
        finally:
            process.send_signal(signal.SIGINT)
            said = process.stdout.read() if process.stdout else ""
    assert (process.returncode, said) == (130, "")


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"]]


def test_a_conversation_goes_on_with_every_model_and_shows_what_worked(address: str, image: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    questions = ["what color is the circle ?", "how big is it ?"]
    for question in questions:
        job = client.submit(question, handle_file(str(image)), None, NAMES, api_name="/ask")
        left, factors, *chats = job.result()
    assert left == "" and all(texts(chat)[::2] == questions and all(texts(chat)) for chat in chats)
    assert len(factors["confidences"]) == 4 and len(job.outputs()) > len(NAMES)


def test_a_mistake_is_told_on_the_page(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(AppError, match="image"):
        Client(address, verbose=False).predict("?", handle_file(tmp_path / "broken.png"), None, NAMES, api_name="/ask")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_asks_nobody_else_and_fits_a_phone(address: str, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(address, width=390)
        while not page.evaluate("document.querySelectorAll('textarea').length"):
            time.sleep(0.1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {address.split("/")[2]}
        assert not [said for said in page.said if "exception" in said or '"level": "error"' in said]
