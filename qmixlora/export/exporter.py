"""A run to ordinary artefacts, `exports/NAME-lora/` on `exports/base/`, and `exports/NAME-merged/`, measured before
they are in place.

Three passes over the targets, so that never more than one model is in memory: `measure_live` with the run's own model,
`write_adapters` with the static adapters on the same backbone, `write_merged` with the merged checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from qmixlora.data import Collator
from qmixlora.files import clear_disk_errors
from qmixlora.session import open_tuned_run

from .adapters import write_adapters
from .base import write_base
from .fidelity import Fidelity
from .fingerprints import write_fingerprints
from .job import FOLDER, Job
from .live import measure_live
from .merged import write_merged
from .static import learned_by
from .targets import Request


def export(folder: Path, request: Request, console: Console) -> list[Fidelity]:
    """Export a run as `request` says, into `folder/exports`; returns the fidelity of every export.

    Raises:
        UserError: no such run, task or data; a base that cannot be merged into; a full disk.
        CheckError: a merged checkpoint does not compute what its adapter computes; nothing of it stays.
    """
    session = open_tuned_run(folder)
    assert isinstance(session.collator, Collator), "a run has a processor"
    job = Job(folder, session.recipe, request, console, session.collator)
    learned = learned_by(session.model, session.anatomy.projector_targets)
    live = measure_live(job, session, learned)
    with clear_disk_errors(folder / FOLDER, "Free some space and export again; what is in place is whole."):
        scratch = folder / FOLDER / ".scratch"
        try:
            base = write_base(job, learned)
            adapters = write_adapters(job, session, learned, live, base, scratch)
            del session  # before other models are loaded
            made = [adapter.fidelity for adapter in adapters if "lora" in request.forms]
            made += write_merged(job, adapters) if "merged" in request.forms else []
            write_fingerprints(job, learned, live, base, made)
            return made
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
