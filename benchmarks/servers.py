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
from served_models import MODELS
from server_breaks import BREAKS
from server_environments import SERVERS, VLLM, environment, folder_of, set_up
from server_tables import RESULTS, write_tables

from qmixlora.files import write_json
from qmixlora.serving.comparison import Difference, difference
from qmixlora.serving.fingerprint import EXPORT, FINGERPRINT, Fingerprint, read_fingerprint
from qmixlora.serving.local import with_peft, with_transformers
from qmixlora.serving.making import answers_of, make_fingerprint
from qmixlora.serving.servers import openai_server
from qmixlora.serving.stock import put_adapter

PORT, PATIENCE = 8765, 900  # seconds until a server that starts is given up
VERSIONS = {"vllm": f"vLLM {VLLM}"}
OPTIONS = {"vllm": ["--enforce-eager"]}
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
        return "--".join(part.replace(" ", "_") for part in parts if part)


CASES = [
    Case("vllm", "demo", "lora"),
    Case("vllm", "demo", "lora", "bfloat16"),
    Case("vllm", "demo", "merged"),
    Case("vllm", "qwen3-vl", "lora"),
    Case("vllm", "qwen3-vl", "merged"),
    *(Case("vllm", "qwen3-vl", "lora", broken=name) for name in BREAKS),
]


def run_of(model: str) -> Path:
    """The run of a model, made on first use."""
    folder = folder_of("models") / model
    if not (folder / "made").is_file():
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


def qmixlora(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "qmixlora.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def start_command(case: Case, exports: Path) -> tuple[list[str], list[Path]]:
    """(the command, the exports that it serves): what serve-files wrote, or one merged checkpoint as it is."""
    options = [*OPTIONS[case.server], "--port", str(PORT)]
    if case.form == "merged":
        folder = sorted(exports.glob("*-merged"))[0]
        return ["vllm", "serve", str(folder), "--dtype", case.dtype, *options], [folder]
    done = qmixlora("serve-files", exports, "--for", case.server)
    if done.returncode:
        raise RuntimeError(done.stderr)
    folders = sorted(exports.glob(f"*-{case.form}"))
    start = exports / f"serve-{case.server}" / "start.sh"
    return ["sh", str(start), *options, "--dtype", case.dtype], folders


def measure(case: Case) -> dict[str, Any]:
    run = run_of(case.model)
    command, folders = start_command(case, run / "exports")
    expected = _wide(case, run, folders)
    with started(case.server, command, folder_of("logs") / f"{case.name}.log") as url:
        told = {one.name: json.loads(qmixlora("check", one, "--url", url, "--json").stdout) for one in folders}
        with ThreadPoolExecutor(len(folders)) as pool:
            reports = list(pool.map(lambda one: _asked(url, one), expected))
    return {
        "command": _shortened(command, run),
        "check": {name: report["verdict"] for name, report in told.items()},
        "fingerprints": {name: report["against"]["export"] for name, report in told.items()},
        "prompts": sum(one.prompts for one in reports),
        "same": sum(one.same for one in reports),
        "mean_difference": sum(map(sum, (one.logprobs for one in reports))) / sum(len(one.logprobs) for one in reports),
        "largest_difference": max(one.largest or 0.0 for one in reports),
    }


def _wide(case: Case, run: Path, folders: Sequence[Path]) -> list[Fingerprint]:
    """More questions than exports' own fingerprints have, answered by stock libraries: on one base, or merged."""
    wide, stock = [], None
    for folder in folders:
        kept = folder_of("expected") / case.model / folder.name
        if not (kept / FINGERPRINT).is_file():
            own = read_fingerprint(folder)
            if stock is None or case.form == "merged":
                stock = (
                    with_transformers(folder, own) if case.form == "merged" else with_peft(folder, own, None)
                ).stock
            else:
                put_adapter(stock, folder)
            prompts = MODELS[case.model].prompts(run, folder)
            answers = {EXPORT: answers_of(stock, prompts, own.max_tokens)}
            of = (own.name, own.form, own.dtype, own.max_tokens)
            kept.mkdir(parents=True, exist_ok=True)
            make_fingerprint(*of, prompts, answers, own.template_arguments).write(kept)
        wide.append(read_fingerprint(kept))
    return wide


def _asked(url: str, expected: Fingerprint) -> Difference:
    server = openai_server(url, expected, "", None)
    answers = [server.answer(prompt.messages, expected.max_tokens) for prompt in expected.prompts]
    return difference(answers, [prompt.answers[EXPORT] for prompt in expected.prompts])


def measure_broken(case: Case) -> dict[str, Any]:
    """What `qmixlora check` says of a server in which something is wrong with task a."""
    assert case.broken is not None
    run = run_of(case.model)
    broken = BREAKS[case.broken](run, folder_of("broken") / case.name)
    command = broken.command or start_command(case, broken.exports)[0]
    command = [*command, *broken.options, *([] if not broken.command else [*OPTIONS[case.server], "--port", str(PORT)])]
    with started(case.server, command, folder_of("logs") / f"{case.name}.log") as url:
        done = qmixlora("check", broken.asked, "--url", url, "--json")
    report = json.loads(done.stdout)
    kept = {key: report[key] for key in ("verdict", "reasons", "notes", "against")}
    return {"command": _shortened(command, run), "how": broken.how, "exit": done.returncode, **kept}


def _shortened(command: Sequence[str], run: Path) -> str:
    words = " ".join(command)
    for folder in (folder_of("broken"), run.parent, run.resolve().parent):
        words = words.replace(f"{folder}/", "")
    return words


def _common(case: Case) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    facts = {"server": VERSIONS[case.server], "model": case.model, "form": case.form, "dtype": case.dtype}
    return {**facts, "hardware": f"{cpu}, no GPU", "compared_with": libraries, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup", "run", "table"))
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
            if wanted and not (RESULTS / f"{case.name}.json").is_file():
                print(case.name, flush=True)
                result = measure_broken(case) if case.broken else measure(case)
                RESULTS.mkdir(parents=True, exist_ok=True)
                write_json(RESULTS / f"{case.name}.json", {**_common(case), **result})


if __name__ == "__main__":
    main()
