"""The forms of exports in servers: how each is started, what the right answers to more questions are, who is asked how.

Right answers are those of stock transformers and PEFT; of a live mixture, the run's own on the weights as served.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served_models import REAL_TASKS, Model
from server_environments import convert

from qmixlora.data import question_about
from qmixlora.evaluation.answers import stop_ids
from qmixlora.mixlora import routed_as
from qmixlora.recipe import Edit, load_recipe
from qmixlora.serving.fingerprint import EXPORT, Answer, Fingerprint, Message, Prompt, read_fingerprint
from qmixlora.serving.local import with_peft, with_transformers
from qmixlora.serving.making import answers_of, make_fingerprint
from qmixlora.serving.route import scales
from qmixlora.serving.servers import Server, llama_server, openai_server
from qmixlora.serving.stock import StockModel, put_adapter
from qmixlora.session import open_tuned_run

LIVE, TOKENS = "live", 16
Ask = Callable[[Prompt], Answer]


def qmixlora(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "qmixlora.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written_for(server: str, exports: Path) -> Path:
    """The folder that serve-files writes."""
    done = qmixlora("serve-files", exports, "--for", server)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return exports / f"serve-{server}"


@dataclass
class Loras:
    """LoRAs on one base, in vLLM."""

    server: str = "vllm"
    check: str | None = "--url"
    form: str = "lora"
    reach: Callable[[str, Fingerprint, str, str | None], Server] = openai_server
    stock: StockModel | None = field(default=None, init=False)

    def command(self, exports: Path, model: Model, dtype: str) -> list[str]:
        return ["sh", str(written_for(self.server, exports) / "start.sh"), "--dtype", dtype]

    def folders(self, exports: Path) -> list[Path]:
        return sorted(exports.glob(f"*-{self.form}"))

    def right(self, folder: Path, prompts: Callable[[str], list[list[Message]]]) -> Fingerprint:
        """What an export has to answer to more questions than its own fingerprint has."""
        own = read_fingerprint(folder)
        asked = prompts(own.name)
        answers = {EXPORT: answers_of(self._stock(folder, own), asked, own.max_tokens)}
        return make_fingerprint(own.name, own.form, own.dtype, own.max_tokens, asked, answers, own.template_arguments)

    def _stock(self, folder: Path, own: Fingerprint) -> StockModel:
        lora = folder.with_name(f"{own.name}-lora")  # which the files of other forms are made of
        if self.stock is None:
            self.stock = with_peft(lora, own, None).stock
        else:
            put_adapter(self.stock, lora)
        return self.stock

    def asking(self, url: str, folder: Path, right: Fingerprint) -> Ask:
        server = self.reach(url, right, "", None)
        return lambda prompt: server.answer(prompt.messages, right.max_tokens)


@dataclass
class Merged(Loras):
    """One merged checkpoint in vLLM, as any other model."""

    form: str = "merged"

    def command(self, exports: Path, model: Model, dtype: str) -> list[str]:
        return ["vllm", "serve", str(self.folders(exports)[0]), "--dtype", dtype]

    def folders(self, exports: Path) -> list[Path]:
        return super().folders(exports)[:1]

    def _stock(self, folder: Path, own: Fingerprint) -> StockModel:
        return with_transformers(folder, own).stock


@dataclass
class Ggufs(Loras):
    """LoRA files of tasks in llama-server, on the base as llama.cpp's converter makes it."""

    server: str = "llama-server"
    check: str | None = "--llama-server"
    form: str = "gguf"
    reach: Callable[[str, Fingerprint, str, str | None], Server] = llama_server

    def command(self, exports: Path, model: Model, dtype: str) -> list[str]:
        folder = written_for(self.server, exports)
        if not (folder / "base.gguf").is_file():
            convert(folder / "convert.sh", model.by_bytes)
        return ["sh", str(folder / "start.sh")]


@dataclass
class Live(Ggufs):
    """The mixture itself in llama-server, by the command of its README and the scales of its client."""

    check: str | None = None
    form: str = LIVE

    def command(self, exports: Path, model: Model, dtype: str) -> list[str]:
        super().command(exports, model, dtype)
        folder = exports / LIVE
        (line,) = (one for one in (folder / "README.md").read_text().splitlines() if one.startswith(self.server))
        base = exports / f"serve-{self.server}" / "base.gguf"
        script = f"cd '{folder}' && exec {line.replace('base.gguf', str(base))} \"$@\""
        return ["sh", "-c", script, self.server]

    def folders(self, exports: Path) -> list[Path]:
        return [exports / LIVE]

    def right(self, folder: Path, prompts: Callable[[str], list[list[Message]]]) -> Fingerprint:
        asked = [messages for task in REAL_TASKS for messages in prompts(task)]
        answers = {EXPORT: live_answers(folder.parents[1], asked)}
        return make_fingerprint(LIVE, "gguf", "float32", TOKENS, asked, answers)

    def asking(self, url: str, folder: Path, right: Fingerprint) -> Ask:
        def ask(prompt: Prompt) -> Answer:
            routed = {"lora": scales(folder, instruction_of(prompt.messages))}
            return Server(url, "base", None, routed, {}).answer(prompt.messages, right.max_tokens)

        return ask


FORMS: dict[tuple[str, str], Callable[[], Loras]] = {
    ("vllm", "lora"): Loras,
    ("vllm", "merged"): Merged,
    ("llama-server", "gguf"): Ggufs,
    ("llama-server", "live-gguf"): Live,
}


def instruction_of(messages: Sequence[Message]) -> str:
    """The words of a conversation of one question."""
    (message,) = messages
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def live_answers(run: Path, prompts: Sequence[list[Message]]) -> list[Answer]:
    """The mixture's own answers to questions without images, on the weights in full precision."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(run, Path(scratch) / "run", ignore=shutil.ignore_patterns("exports")))
        recipe = Edit({"model.quantization": "none"}).apply(load_recipe(str(copy / "recipe.yaml")))
        (copy / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        session = open_tuned_run(copy)
    collator: Any = session.collator
    stock, answers = StockModel(session.model, collator.processor, stop_ids(session), {}), []
    for messages in prompts:
        _, routing = collator.routed_prompts([question_about([], instruction_of(messages))])
        with session.evaluating(), routed_as(session.model, **routing):
            answers.append(stock.answer(messages, TOKENS))
    return answers
