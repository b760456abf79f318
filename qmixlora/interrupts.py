"""Ctrl-C, SIGTERM and SIGHUP: an exception wherever the process is, or a request where work must not be torn apart."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# Windows has no SIGHUP
NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP (the terminal was closed)"}
SIGNALS = {getattr(signal, name): words for name, words in NAMES.items() if hasattr(signal, name)}


class Interrupted(BaseException):
    """A signal asked this process to end, which its exit code tells as shells do: 128 and the signal's number.

    No KeyboardInterrupt, which the command line's library would take for its own.
    """

    def __init__(self, number: int, advice: str = "What is in place is whole.") -> None:
        self.number = number
        self.exit_code = 128 + number
        super().__init__(f"Stopped by {SIGNALS[number]}. {advice}")


class Requests:
    """Signals that came while they were deferred: the first is remembered, the second raises `Interrupted`."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait in a block, whose work has to ask for `number` where it can stop."""
        with _handled_by(self._remember):
            yield

    def _remember(self, number: int) -> None:
        if self.number is not None:
            raise Interrupted(number, "The step was not finished; checkpoints that are in place are whole.")
        self.number = number
        with suppress(OSError, RuntimeError):  # the terminal may be gone, or this comes in the middle of a line to it
            print(f"{SIGNALS[number]}: stopping after this step (again: at once)", file=sys.stderr, flush=True)


@contextmanager
def raised() -> Iterator[None]:
    """Let signals raise `Interrupted` in a block."""
    with _handled_by(_raise):
        yield


def _raise(number: int) -> None:
    raise Interrupted(number)


@contextmanager
def _handled_by(handle: Callable[[int], None]) -> Iterator[None]:
    """Hand signals to a function in a block, but those that this process was started to ignore (`nohup`).

    Processes that are forked meanwhile do not take part. (Of a thread that is not the main one Python hands on none.)
    """
    process, before = os.getpid(), {}

    def take(number: int, frame: object) -> None:
        if os.getpid() != process:
            _end_worker(number)
            return
        if number == getattr(signal, "SIGHUP", None):
            _let_go_of_terminal()
        handle(number)

    if threading.current_thread() is threading.main_thread():
        ignored = {signal.SIG_IGN, None}
        before = {number: old for number in SIGNALS if (old := signal.getsignal(number)) not in ignored}
        for number in before:
            signal.signal(number, take)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end_worker(number: int) -> None:
    """End a worker whom its parent ends. Ctrl-C reaches all processes of a terminal: what it means, the parent says."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _let_go_of_terminal() -> None:
    """Send what is still said nowhere, where it would go to a terminal that was closed: writing to it fails."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            if stream.isatty():
                send_nowhere(stream)


def send_nowhere(stream: TextIO) -> None:
    """Lead a stream's file itself nowhere, for the sake of what is in its buffer, and of what else writes to it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
