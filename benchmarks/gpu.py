"""Everything that wants a GPU, the most important first.

    python benchmarks/gpu.py run [--budget SECONDS] [--only STEP]... [--to FOLDER] [--jobs N]
                                                                        one JSON file per step in results/gpu/
    python benchmarks/gpu.py list
    python benchmarks/gpu.py table                                      docs/gpu.md

Every step is a process of its own, whose result is written at once; steps whose file is there are skipped, so that a
run that was cut off goes on. A step starts only if it is likely to end within the budget. Steps of `memory` measure the
cases of declared.json, whose predictions were written down before (benchmarks/memory.py); a folder of results keeps
those that it was begun with, since code goes on. With `--jobs`, so many steps run at a time, but for those that measure
time or the whole card. `--toy` runs them at toy size, on a CPU too: that shows that they run, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import memory
import on_gpu
import speed
import torch
from cases import GPU
from gpu_page import write_page
from qmixlora.cli.quiet import quiet

from qmixlora.files import write_json

RESULTS = Path(__file__).parent / "results" / "gpu"
FIRST = 6  # cases of memory that come before everything but the shortest steps


@dataclass(frozen=True)
class Step:
    """One measurement: what is told whether it is to be of toy size, the seconds that it takes on a fast card
    (estimated), and whether it needs the card for itself.
    """

    name: str
    measure: Callable[[bool], dict[str, Any]]
    seconds: int
    alone: bool = True


def _memory(name: str) -> Step:
    return Step(f"memory-{name}", lambda toy: memory.prediction(name) if toy else memory.execute(name), 40, alone=False)


def _speed(batch: int, compiled: bool = False) -> Step:
    name = f"speed-batch-{batch}{'-compiled' if compiled else ''}"
    return Step(name, lambda toy: speed.of_batch(batch, toy=toy, compiled=compiled), 150 if compiled else 60)


def _demo(toy: bool) -> dict[str, Any]:
    """The whole demo by its command."""
    command = [sys.executable, "-c", "from qmixlora.cli.main import run; run()", "demo", *(["--help"] if toy else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = []
    for line in process.stdout or ():
        print(line, end="", flush=True)  # what is told of a demo that is cut off too
        told.append(line)
    return {"exit": process.wait(), "told": "".join(told)[-5000:]}


STEPS = (
    Step("quantisers", on_gpu.quantisers, 20),
    Step("context", on_gpu.context, 20),
    Step("levers", on_gpu.levers, 180, alone=False),
    *(_memory(name) for name in list(GPU)[:FIRST]),
    Step("ladder", on_gpu.ladder, 60, alone=False),
    _speed(4),
    *(_memory(name) for name in list(GPU)[FIRST:]),
    _speed(1),
    _speed(8),
    _speed(4, compiled=True),
    Step("demo", _demo, 180),
)


def run(budget: float, only: list[str], toy: bool, folder: Path, jobs: int = 1) -> None:
    """Run the steps that are left, as long as the budget (seconds) is likely to hold the next one."""
    end = time.monotonic() + budget
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / memory.DECLARED.name).exists():
        shutil.copy(memory.DECLARED, folder)
    wanted = [step for step in STEPS if not only or any(step.name.startswith(name) for name in only)]
    with ThreadPoolExecutor(jobs) as pool:
        running: list[Future[None]] = []
        for step in wanted:
            if (folder / f"{step.name}.json").exists():
                continue
            if step.alone:
                wait(running)
            running.append(pool.submit(_run, step, end, folder, toy))
            if step.alone:
                wait(running)


def _run(step: Step, end: float, folder: Path, toy: bool) -> None:
    """Run a step in a process of its own, if it is likely to end in time."""
    began = time.monotonic()
    left = end - began
    if step.seconds > left:
        print(f"{step.name}: not started, {left:.0f} s are left and it takes about {step.seconds}", flush=True)
        return
    file = folder / f"{step.name}.json"
    command = [sys.executable, __file__, "execute", step.name, "--to", str(file), *(["--toy"] if toy else [])]
    ended = _ended(command, min(left, 4 * step.seconds))
    print(f"{step.name}: {time.monotonic() - began:.0f} s{f', ended with {ended}' if ended else ''}", flush=True)


def _ended(command: list[str], seconds: float) -> int | str:
    """How a process ended, with all that it had started if it took longer."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "a time-out"


def execute(name: str, toy: bool) -> dict[str, Any]:
    """One step, in this process."""
    step = next(step for step in STEPS if step.name == name)
    start = time.monotonic()
    result = step.measure(toy)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"step": name, "hardware": hardware, "toy": toy, **memory.versions(), "result": result,
            "seconds": time.monotonic() - start}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "execute", "list", "table"), help="execute: a step in this process")
    parser.add_argument("step", nargs="?", help="of execute")
    parser.add_argument("--budget", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="steps that begin like this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="steps at a time")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--to", type=Path, help="the folder of results, or of execute the file")
    arguments = parser.parse_args()
    quiet()  # sets up torch's CUDA allocator too
    if arguments.command == "run":
        run(arguments.budget, arguments.only, arguments.toy, arguments.to or RESULTS, arguments.jobs)
    elif arguments.command == "execute":
        write_json(arguments.to, execute(arguments.step, arguments.toy))
    elif arguments.command == "list":
        print("\n".join(f"{step.name:44} {step.seconds:4} s" for step in STEPS))
    else:
        write_page(RESULTS, memory.DECLARED, [step.name for step in STEPS])


if __name__ == "__main__":
    main()
