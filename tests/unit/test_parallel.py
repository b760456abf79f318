"""Work in forked processes, and how these end."""

from __future__ import annotations

import os
import signal
import sys
from pickle import PicklingError

import pytest

from qmixlora import parallel
from qmixlora.errors import UserError
from qmixlora.interrupts import raised

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def test_results_come_in_the_order_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    told: list[tuple[int, int]] = []
    done = parallel.side_by_side([lambda: 1, lambda: 2, lambda: 3], lambda count, of: told.append((count, of)))
    assert done == [1, 2, 3] and told[-1] == (3, 3)


class AnsweredError(Exception):
    """As libraries' are that hold what they were answered: it cannot be unpickled by its `args`."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def unanswered() -> None:
    raise AnsweredError("no such image", status=404)


class NoNumber:
    """A result that cannot be unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return int, ("no number",)


def test_an_exception_that_cannot_be_sent_is_raised_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool itself would wait for it for ever."""
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    with pytest.raises(RuntimeError, match="AnsweredError: no such image"):
        parallel.side_by_side([lambda: None, unanswered, lambda: None])


@pytest.mark.parametrize("result", [NoNumber(), lambda: None], ids=["not unpickled", "not pickled"])
def test_a_result_that_cannot_be_sent_is_an_error(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    with pytest.raises((ValueError, AttributeError, PicklingError)):
        parallel.side_by_side([lambda: None, lambda: result])


def test_an_exception_of_ours_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)

    def refused() -> None:
        raise UserError("Too large.", where="data", fix="Less.")

    with pytest.raises(UserError) as caught:
        parallel.side_by_side([lambda: None, refused])
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("Too large.", "data", "Less.")


def test_a_forked_process_is_ended_by_a_signal_whatever_its_parent_does_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the command line's own handler, one that waits for work when it is ended may wait for ever."""
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    with raised():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        handlers = parallel.side_by_side([lambda: signal.getsignal(signal.SIGTERM) == signal.SIG_DFL] * 2)
    assert handlers == [True, True]


def test_a_signal_that_comes_while_a_process_is_forked_waits_until_it_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    begin, held_back = parallel._begin, set()

    def watched() -> None:
        held_back.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        begin()

    monkeypatch.setattr(parallel, "_begin", watched)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    masks = parallel.side_by_side([lambda: (held_back, signal.pthread_sigmask(signal.SIG_BLOCK, ()))] * 2)
    ends = {signal.SIGTERM, signal.SIGINT}
    assert all(ends <= forked and not ends & begun for forked, begun in masks)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_process_that_the_system_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out: the pool itself would wait for its result for ever."""
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    with pytest.raises(UserError, match=r"ended from outside \(exit code -9\)"):
        parallel.side_by_side([lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None])
