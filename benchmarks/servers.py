"""Exports in real servers: whether they answer as stock transformers and PEFT do, and what `qmixlora check` says.

    python benchmarks/servers.py setup vllm|llama-server      an environment of its own for the server
    python benchmarks/servers.py run [NAME ...]               measurements that are not kept yet
    python benchmarks/servers.py table                        docs/serving.md

Each server is started by the `start.sh` that `qmixlora serve-files` writes. One JSON per measurement is kept in
results/servers/: 20 questions of every task beside its fingerprint, all at once; or something is wrong with what is
served, and `check` has to say so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import llama_breaks
import vllm_breaks
from served_models import MODELS
from server_environments import SERVERS, environment, folder_of, set_up, version
from server_forms import FORMS, Ask, Loras, qmixlora
from server_tables import RESULTS, write_tables
from transformers.image_utils import load_images

from qmixlora.files import write_json
from qmixlora.serving.comparison import Difference, difference
from qmixlora.serving.fingerprint import EXPORT, FINGERPRINT, Fingerprint, Prompt, read_fingerprint
from qmixlora.serving.servers import Server, call

PORT, PATIENCE = 8765, 900  # seconds until a server that starts is given up
BREAKS = {"vllm": vllm_breaks.BREAKS, "llama-server": llama_breaks.BREAKS}
HALF_CACHE = "float32, cache float16"  # as llama-server has it by itself
OPTIONS = {"vllm": ["--enforce-eager"], "llama-server": ["--threads", "1"]}
AT_ONCE = "float32, 4 at once"  # as llama-server has it by itself
F32 = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
ROUNDS = {AT_ONCE: 5}  # what goes wrong there is a matter of moments
MORE = {("llama-server", "float32"): F32, ("llama-server", AT_ONCE): [*F32, "--parallel", "4"]}
HEALTH = "/health"


@dataclass(frozen=True)
class Case:
    """One measurement: a form of a model's exports in a server; `broken` names what is wrong (None: nothing)."""

    server: str
    model: str
    form: str
    dtype: str = "float32"
    broken: str | None = None

    @property
    def name(self) -> str:
        parts = (self.server, self.model, self.form, self.dtype, self.broken)
        return "--".join(re.sub("[^a-z0-9.-]+", "_", part) for part in parts if part)


CASES = [
    Case("vllm", "demo", "lora"),
    Case("vllm", "demo", "lora", "bfloat16"),
    Case("vllm", "demo", "merged"),
    Case("vllm", "qwen3-vl", "lora"),
    Case("vllm", "qwen3-vl", "merged"),
    *(Case("vllm", "qwen3-vl", "lora", broken=name) for name in BREAKS["vllm"]),
    Case("llama-server", "smollm2", "gguf"),
    Case("llama-server", "smollm2", "gguf", HALF_CACHE),
    Case("llama-server", "smollm2", "live-gguf"),
    Case("llama-server", "qwen2.5-vl", "gguf"),
    Case("llama-server", "qwen2.5-vl", "gguf", AT_ONCE),
    Case("llama-server", "qwen3-vl", "gguf"),
    *(Case("llama-server", "qwen2.5-vl", "gguf", broken=name) for name in BREAKS["llama-server"]),
]


def run_of(model: str) -> Path:
    """The run of a model, made on first use."""
    folder = folder_of("models") / model
    if not (folder / "made").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        MODELS[model].make(folder)
        (folder / "made").touch()
    return folder / "run"


@contextlib.contextmanager
def started(server: str, command: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server while it runs. Raises RuntimeError if it ends, or is not ready in time."""
    url = f"http://127.0.0.1:{PORT}"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment(server), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + PATIENCE
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{server} did not start:\n" + "\n".join(log.read_text().splitlines()[-20:]))
            time.sleep(2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + HEALTH, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start_command(case: Case, exports: Path) -> list[str]:
    """The command that serves exports as a case wants it, of this form's kind."""
    own = FORMS[case.server, case.form]().command(exports, MODELS[case.model], case.dtype)
    return [*own, *options(case)]


def options(case: Case) -> list[str]:
    """What every server of a case is started with."""
    return [*OPTIONS[case.server], *MORE.get((case.server, case.dtype), ()), "--port", str(PORT)]


def measure(case: Case) -> dict[str, Any]:
    run, form = run_of(case.model), FORMS[case.server, case.form]()
    rounds = ROUNDS.get(case.dtype, 1)
    folders = form.folders(run / "exports")
    command = start_command(case, run / "exports")
    right = [_right(case, run, folder, form) for folder in folders]
    with started(case.server, command, folder_of("logs") / f"{case.name}.log") as url:
        told = {one.name: _checked(one, form.check, url) for one in folders} if form.check else {}
        with ThreadPoolExecutor(len(folders)) as pool:
            asked = [(form.asking(url, folder, one), one) for folder, one in zip(folders, right, strict=True)]
            answered = [pair for pairs in pool.map(lambda one: _differences(*one), asked * rounds) for pair in pairs]
        plain = None if form.check else _differences(_without_any(url, right[0]), right[0])
    logprobs = [value for _, one in answered for value in one.logprobs]
    return {
        "command": _shortened(command, run),
        "check": {name: report["verdict"] for name, (_, report) in told.items()},
        "fingerprints": {name: report["against"]["export"] for name, (_, report) in told.items()},
        "prompts": len(answered),
        "same": sum(one.same for _, one in answered),
        "mean_difference": sum(logprobs) / len(logprobs),
        "largest_difference": max(logprobs),
        "by_image": _by_image(answered),
        **({"same_without_adapters": sum(one.same for _, one in plain)} if plain else {}),
    }


def _by_image(answered: Sequence[tuple[Prompt, Difference]]) -> dict[str, dict[str, Any]]:
    """The same by the width and height of the image that a prompt has ("none" without one)."""
    sizes: dict[str, list[Difference]] = {}
    for prompt, one in answered:
        parts = [part for message in prompt.messages for part in message["content"] if part["type"] != "text"]
        images = [load_images(part["image_url"]["url"]) for part in parts]
        sizes.setdefault(" ".join(f"{image.width}x{image.height}" for image in images) or "none", []).append(one)
    return {
        size: {
            "prompts": len(own),
            "same": sum(one.same for one in own),
            "largest_difference": max((one.largest or 0.0 for one in own), default=0.0),
        }
        for size, own in sizes.items()
    }


def _right(case: Case, run: Path, folder: Path, form: Loras) -> Fingerprint:
    """Right answers to more questions than an export's own fingerprint has, made once."""
    kept = folder_of("expected") / case.model / folder.name.replace("-gguf", "-lora")
    if not (kept / FINGERPRINT).is_file():
        made = form.right(folder, lambda task: MODELS[case.model].prompts(run, task))
        kept.mkdir(parents=True, exist_ok=True)
        made.write(kept)
    return read_fingerprint(kept)


def _checked(folder: Path, option: str, url: str, *more: str) -> tuple[int, dict[str, Any]]:
    """(the exit code, the report) of `qmixlora check`."""
    done = qmixlora("check", folder, option, url, "--json", *more)
    return done.returncode, json.loads(done.stdout)


def _differences(ask: Ask, right: Fingerprint) -> list[tuple[Prompt, Difference]]:
    return [(prompt, difference([ask(prompt)], [prompt.answers[EXPORT]])) for prompt in right.prompts]


def _without_any(url: str, right: Fingerprint) -> Ask:
    """Asks llama-server with all of its adapters left out."""
    none = [{"id": one["id"], "scale": 0.0} for one in call(url, "/lora-adapters")]
    server = Server(url, "base", None, {"lora": none}, {})
    return lambda prompt: server.answer(prompt.messages, right.max_tokens)


def measure_broken(case: Case) -> dict[str, Any]:
    """What `qmixlora check` says of a server in which something is wrong with task a."""
    assert case.broken is not None
    run, option = run_of(case.model), FORMS[case.server, case.form]().check
    broken = BREAKS[case.server][case.broken](run, folder_of("broken") / case.name)
    own = [*broken.command, *options(case)] if broken.command else start_command(case, broken.exports)
    command = [*own, *broken.options]
    with started(case.server, command, folder_of("logs") / f"{case.name}.log") as url:
        for before, name in broken.before:
            _checked(before, str(option), url, "--name", name)
        code, report = _checked(broken.asked, str(option), url)
    kept = {key: report[key] for key in ("verdict", "reasons", "notes", "against")}
    return {"command": _shortened(command, run), "how": broken.how, "exit": code, **kept}


def _shortened(command: Sequence[str], run: Path) -> str:
    words = " ".join(command)
    for folder in (folder_of("broken"), run.parent, run.resolve().parent):
        words = words.replace(f"{folder}/", "")
    return words


def _common(case: Case) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    facts = {"server": version(case.server), "model": case.model, "form": case.form, "dtype": case.dtype}
    return {**facts, "hardware": f"{cpu}, no GPU", "compared_with": libraries, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup", "run", "table"))
    parser.add_argument("--to", type=Path, default=RESULTS, help="the folder of the measurements")
    parser.add_argument(
        "names", nargs="*", help="of servers to set up; of measurements, or the beginnings of their names"
    )
    arguments = parser.parse_args()
    if arguments.command == "setup":
        for server in arguments.names or SERVERS:
            set_up(server)
    elif arguments.command == "table":
        write_tables()
    else:
        folder_of("logs").mkdir(parents=True, exist_ok=True)
        for case in CASES:
            wanted = not arguments.names or case.name.startswith(tuple(arguments.names))
            file = arguments.to / f"{case.name}.json"
            if wanted and not file.is_file():
                print(case.name, flush=True)
                result = measure_broken(case) if case.broken else measure(case)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {**_common(case), **result})


if __name__ == "__main__":
    main()
