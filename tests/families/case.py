"""A variant's checkpoint and data, and what the stages do with them.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from qmixlora.data import load_conversations
from qmixlora.export import Request, export
from qmixlora.loss import supervised_logits
from qmixlora.mixlora import is_adapter_parameter
from qmixlora.recipe import Recipe, validate
from qmixlora.session import Session, TunedSession, open_session
from qmixlora.training import train

from .checkpoint import make_checkpoint, make_data
from .variant import Variant

QUIET = Console(quiet=True)
TASKS = ("a", "b")


@dataclass(frozen=True)
class Case:
    """A variant's checkpoint and data in a folder of their own."""

    variant: Variant
    folder: Path

    @cached_property
    def model(self) -> Path:
        (self.folder / "model").mkdir()
        return make_checkpoint(self.variant, self.folder / "model")

    @cached_property
    def data(self) -> Path:
        return make_data(self.folder)

    def recipe(self, run: str = "run", **sections: dict[str, Any]) -> Recipe:
        """A recipe for the checkpoint; keyword arguments are sections with what to change."""
        values: dict[str, dict[str, Any]] = {
            "model": {"id": str(self.model), "dtype": "float32", **self.variant.model},
            "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0, **self.variant.adapter},
            "data": {"train": str(self.data), "max_length": 1500},
            "train": {
                "output": str(self.folder / run), "max_steps": 2, "micro_batch_size": 2, "gradient_accumulation": 1,
                "learning_rate": 2e-2, "log_every": 1, "max_new_tokens": 6, "save_every": None,
            },
            "export": {"polish": 0, "samples": 2},
        }  # fmt: skip
        for name, section in sections.items():
            values[name].update(section)
        return validate(values, "test")

    @cached_property
    def rows(self) -> list[Any]:
        return list(load_conversations(str(self.data)))

    @cached_property
    def session(self) -> TunedSession:
        """The NF4 backbone with a fresh adapter, none of whose parts is zero; in evaluation mode."""
        session = open_session(self.recipe(), TASKS)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in session.model.named_parameters():
                if is_adapter_parameter(name) and not parameter.any():
                    parameter.normal_(0, 0.1)
        session.model.eval()
        return session

    @cached_property
    def run(self) -> Path:
        """The folder of a run of two steps."""
        return train(self.recipe(), console=QUIET)

    @cached_property
    def lora(self) -> Path:
        """The run's LoRA of one task."""
        export(self.run, Request(tasks=("a",), forms=("lora",), fingerprint=False), QUIET)
        return self.run / "exports" / "a-lora"

    @cached_property
    def merged(self) -> Path:
        """The same, merged into the NF4 backbone."""
        assert self.lora.is_dir()
        export(self.run, Request(tasks=("a",), forms=("merged",), fingerprint=False), QUIET)
        return self.run / "exports" / "a-merged"


def tuned_inputs(session: Session, rows: Any) -> dict[str, Any]:
    return {name: value for name, value in session.collator(list(rows)).items() if name != "labels"}


def plain_inputs(session: Session, rows: Any) -> dict[str, Any]:
    """As a model without a mixture takes them."""
    return {name: value for name, value in tuned_inputs(session, rows).items() if name in taken(session)}


def taken(session: Session) -> set[str]:
    return {*inspect.signature(session.backbone.forward).parameters}


def logits_of(session: Session, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return session.model(**inputs, use_cache=False).logits


def routed_on(session: TunedSession, batch: dict[str, Any]) -> Tensor:
    """The tokens that the batch was routed on (B x S)."""
    logits_of(session, {name: value for name, value in batch.items() if name != "labels"})
    routed_BS = session.model.base_model.mixlora_routing.current.instruction_BS
    assert routed_BS is not None
    return routed_BS


def supervised_of(session: Session, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return supervised_logits(session.model.eval(), batch)


def another_picture(case: Case) -> Any:
    path = case.folder / "white.png"
    Image.new("RGB", (40, 40), "white").save(path)
    return [{"path": str(path), "bytes": None}]
