"""Several processes on one step: each has its part of the effective batch, and they meet where the step's gradient is
whole.

The trained parameters are few and lie in every process, so nothing is wrapped around the model: what torch's
`DistributedDataParallel` does in a backward pass is done once per optimiser step, for gradients and running means
alike. An effective batch is the same samples however many processes there are, so that they learn what one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from qmixlora import processes
from qmixlora.data import IGNORED
from qmixlora.device import default_device
from qmixlora.mixlora import sums_of_step
from qmixlora.out_of_memory import OutOfMemoryInStep, is_out_of_memory


class Shares(BatchSamplerShard):
    """The batches of one process, as accelerate deals them, with an empty one where accelerate would repeat samples, so
    that every process has as many.
    """

    def __len__(self) -> int:
        return -(-int(self.total_length) // int(self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        own = None
        for number, batch in enumerate(self.batch_sampler):
            own = batch if number % self.num_processes == self.process_index else own
            if (number + 1) % self.num_processes == 0:
                yield own or []
                own = None
        if self.total_length % self.num_processes:
            yield own or []

    @property
    def sampler(self) -> Any:
        """What the epochs are set of, which accelerate's own loses where a run is resumed."""
        return self.batch_sampler.sampler


def deal(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Have a loader that accelerate has prepared repeat no sample, unless each process has to compute in every step,
    since it holds a share of the weights.
    """
    if isinstance(loader.batch_sampler, BatchSamplerShard) and not processes.are_sharded():
        loader.batch_sampler.__class__ = Shares  # no loader takes another one
    return loader


def idle_batch() -> dict[str, Any]:
    """The collated form of no sample: Trainer counts its labels as it does others'."""
    return {"labels": torch.full((1, 1), IGNORED)}


def is_idle(inputs: dict[str, Any]) -> bool:
    """Whether a batch is that of a process which has no sample left in this step."""
    return inputs.keys() <= {"labels"}


class Meeting:
    """Where processes meet in every optimiser step; one that was started alone meets nobody."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ran_out = False  # of memory, in this step

    def begin(self) -> None:
        """Start from the main process' parameters."""
        with torch.no_grad():
            processes.as_in_main(self.trained)

    def attempt(self, micro_batch: Callable[[], Tensor]) -> Tensor:
        """The loss of a micro-batch. Where memory runs out among several processes, the others are told when they meet:
        until then they would wait for this one.
        """
        if not processes.are_several() or processes.are_sharded():  # there they wait for one another in every layer
            return micro_batch()
        if not self.ran_out:
            try:
                return micro_batch()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.ran_out = True
            clear_device_cache(garbage_collection=True)  # the exception's frames have held the step's tensors
        return self.nothing()

    def nothing(self) -> Tensor:
        """The loss of no sample."""
        return torch.zeros((), device=default_device())

    @torch.no_grad()
    def meet(self, *, idle: bool) -> None:
        """Add up the gradients of a step, and what its passes have added to running means. `idle`: there was none.

        Raises:
            OutOfMemoryInStep: memory ran out in one of the processes; it is raised in all of them.
        """
        if not processes.are_several():
            return
        ran_out, self.ran_out = self.ran_out, False
        ran_out_anywhere, *has_gradient = processes.largest([ran_out, *(p.grad is not None for p in self.trained)])
        if ran_out_anywhere:
            raise OutOfMemoryInStep("out of memory in a process of the run")
        sums = sums_of_step(self.model, idle=idle)
        for parameter, has in zip(self.trained, has_gradient, strict=True):
            if has:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                sums.append(parameter.grad)
        processes.add_up(sums)
