"""The forms of an export, in one table: what each is made of, and by which function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from . import gguf_loras, live_gguf
from .adapters import Adapter
from .fidelity import Fidelity
from .job import Job
from .merged import write_merged
from .static import Learned
from .targets import Form, Request


def _any(recipe: Recipe, request: Request) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Maker:
    """How exports of a form are made: `of_adapters`, from the static adapter of every target, or `of_run`, once, from
    the run as it is.

    `check` raises UserError, before a model is loaded, for what the form cannot be made of. `on_base`: they lie on the
    base that has the run's trained projector.
    """

    of_adapters: Callable[[Job, Sequence[Adapter]], list[Fidelity]] | None = None
    of_run: Callable[[Job, TunedSession, Learned], None] | None = None
    check: Callable[[Recipe, Request], None] = _any
    on_base: bool = True


MAKERS: Mapping[Form, Maker] = {
    "lora": Maker(lambda job, adapters: [adapter.fidelity for adapter in adapters]),
    "merged": Maker(write_merged, on_base=False),
    "gguf": Maker(gguf_loras.write, check=gguf_loras.check),
    "live-gguf": Maker(of_run=live_gguf.write, check=live_gguf.check),
}


def are_of_tasks(forms: Sequence[Form]) -> bool:
    """Whether one of the forms is made for every task, or mixture of tasks."""
    return any(MAKERS[form].of_adapters is not None for form in forms)
