"""Several processes of one command on this machine, as `accelerate launch` and `torchrun` start them; no torch here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from .interrupts import SIGNALS

GRACE = 30.0  # seconds in which processes end by themselves when one of them has failed; a collective may block them
POLL = 0.05  # seconds


def is_launched() -> bool:
    """Whether a launcher has started this process among several, by the variables that all launchers set."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_launched() else 0


def processes_here() -> int:
    """The number of processes that a launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if is_launched() else 1


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command in so many processes and return its exit code: of the first process that failed, else 0.

    Signals that arrive here go to all of them. When one fails, the others have GRACE seconds to end. Each has a session
    of its own, so that Ctrl-C does not reach it twice.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in shared.items()}}
    children: list[subprocess.Popen[bytes]] = []
    with _forwarded_to(children):
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env={**environment, **ranks}, start_new_session=True))
        return _ended(children)


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all children, and end those that outlive one that failed."""
    failed: subprocess.Popen[bytes] | None = None
    patience = float("inf")
    while running := [child for child in children if child.poll() is None]:
        if failed is None and (failed := next((c for c in children if c.returncode), None)) is not None:
            patience = time.monotonic() + GRACE
        if time.monotonic() > patience:
            for child in running:
                child.kill()
        time.sleep(POLL)
    failed = failed or next((child for child in children if child.returncode), None)
    if failed is None:
        return 0
    if failed.returncode > 0:
        return failed.returncode
    number = -failed.returncode
    which = f"Process {children.index(failed)} of {len(children)}"
    print(
        f"qmixlora: {which} was ended by {signal.Signals(number).name}, and the run with it. Checkpoints that are in "
        "place are whole: go on with --resume.",
        file=sys.stderr,
    )
    return 128 + number


@contextmanager
def _forwarded_to(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand every signal that asks this process to end on to its children, in a block."""

    def forward(number: int, frame: object) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    before = {
        number: signal.signal(number, forward) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
