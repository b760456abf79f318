"""The processes that make batches while the model computes (`data.num_workers`); what they make depends on neither."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmixlora.data import Conversation
from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.launch import processes_here
from qmixlora.parallel import usable_cores

MOST = 4  # one model takes batches no faster
FEW = 1000  # samples that are made sooner than processes pay
SHARED = Path("/dev/shm")  # batches come through it; in many containers it holds 64 MiB, and a full one kills the run
ERROR = "user_error"


def loader_workers(asked: int | None, samples: int) -> int:
    """As many processes as the recipe asks for; else by the machine, which keeps a core for the run itself.

    None where they could not simply be forked (Windows, macOS, Python from 3.14 on: the model would be sent to each),
    where shared memory is short, and for data of few samples.
    """
    if asked is not None:
        return asked
    if samples < FEW or not _forks_by_default() or (SHARED.is_dir() and shutil.disk_usage(SHARED).free < GIB):
        return 0
    return max(0, min(MOST, usable_cores() // processes_here() - 1))


def _forks_by_default() -> bool:
    chosen = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return chosen == "fork" and not multiprocessing.current_process().daemon


@dataclass(frozen=True)
class ErrorCarrier:
    """A collator for workers: a UserError comes back in place of the batch, to be raised by `unless_error`.

    torch's own loader would raise another one in its place, whose text is a traceback.
    """

    collator: Callable[[Sequence[Conversation]], dict[str, Any]]

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        try:
            return self.collator(rows)
        except UserError as error:
            return {ERROR: error}


def unless_error(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches. Raises the UserError that stands in place of one."""
    for batch in batches:
        if ERROR in batch:
            raise batch[ERROR]
        yield batch
