"""Where what the commands print goes; that it can no longer be written does not end work that is worth more."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from qmixlora.interrupts import send_nowhere

NOT_WRITTEN = 74  # EX_IOERR of sysexits.h: all is done, but for what should have been printed
NOT_READ = 141  # 128 and SIGPIPE: as programs end whose reader has left


class OutputLostError(SystemExit):
    """A command can no longer print, and is for nothing else. (No OSError, which the libraries that print would take
    for their own.)
    """


class Output:
    """A text stream, or what of it can be written: after the first error, of which `on_lost` is told, all goes nowhere.

    Such as a pipe whose reader has left (`| head -1`), a disk that is full, or a terminal that is gone.
    """

    def __init__(self, stream: TextIO, on_lost: Callable[[OSError], None]) -> None:
        self.stream, self.on_lost = stream, on_lost
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, as far as that is possible. Returns its length."""
        self._unless_lost(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is in the buffer, as far as that is possible."""
        self._unless_lost(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _unless_lost(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if self.error is None:
                self.error = error
                send_nowhere(self.stream)
                self.on_lost(error)


def print_json(content: object) -> None:
    """Print what a command has made, for other programs."""
    print(json.dumps(content, indent=2))


class _Standard:
    """Standard output, which a command outlasts if it `goes_on`."""

    goes_on = False

    def lost(self, error: OSError) -> None:
        if self.goes_on:
            print(f"qmixlora: What is printed is lost from here on, and only that: {error.strerror}.", file=sys.stderr)
        elif error.errno != errno.EPIPE:
            print(f"qmixlora: What is printed cannot be written: {error.strerror}.", file=sys.stderr)
        if not self.goes_on:
            raise OutputLostError(self.exit_code(error))

    def exit_code(self, error: OSError) -> int:
        if error.errno != errno.EPIPE:
            return NOT_WRITTEN
        return 0 if self.goes_on else NOT_READ


_standard = _Standard()


def outlast() -> None:
    """Let this command go on when it can no longer print: what it makes is worth more than what it says."""
    _standard.goes_on = True


@contextmanager
def guarded() -> Iterator[None]:
    """Print through `Output` in a block that ends in SystemExit, whose code tells too that something was not written.

    Raises OutputLostError where standard output fails and nobody has called `outlast`. Standard error ends nothing.
    """
    streams, _standard.goes_on = (sys.stdout, sys.stderr), False
    outputs = [
        None if stream is None else Output(stream, on_lost)  # none: it was closed before this process began
        for stream, on_lost in zip(streams, (_standard.lost, lambda error: None), strict=True)
    ]
    sys.stdout, sys.stderr = (cast(TextIO, output) for output in outputs)
    try:
        yield
    except SystemExit as end:
        if outputs[0] is not None:
            outputs[0].flush()
            if not end.code and outputs[0].error is not None:
                raise SystemExit(_standard.exit_code(outputs[0].error)) from None
        raise
    finally:
        sys.stdout, sys.stderr = streams
