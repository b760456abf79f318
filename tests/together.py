"""Several processes of one run, forked from the test, as a launcher starts them: gloo, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from accelerate.state import AcceleratorState


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What some work gives in each of so many processes, by their rank; of an exception its class' name and text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [context.Process(target=_begin, args=(work, rank, count, port, pipes[rank][1])) for rank in range(count)]
    for child in children:
        child.start()
    for _, end in pipes:
        end.close()
    results = [_received(pipe) for pipe, _ in pipes]
    for child in children:
        child.join()
    return results


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return "killed"


def _begin(work: Callable[[int], Any], rank: int, count: int, port: int, pipe: Connection) -> None:
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    AcceleratorState._reset_state(reset_partial_state=True)  # the test's own
    try:
        result: Any = work(rank)
    except BaseException as error:
        result = (type(error).__name__, str(error))
    pipe.send(result)
    pipe.close()
    os._exit(0)  # without the test's own ends
