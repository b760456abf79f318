"""Work without Python's search for cycles of garbage. No heavy imports: commands begin with it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python's search for cycles is off, where there is next to none to find: in imports and tensors without storage,
    of which it would take an eighth of the time, and in rows that are made by the thousand and dropped at once, a
    quarter.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
