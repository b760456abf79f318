"""A run to ordinary artefacts, such as `exports/NAME-lora/` on `exports/base/`, and `exports/NAME-merged/`, measured
before they are in place; the table of their forms is `forms.py`. `exports/picker/` chooses among them.

Three passes over the targets, so that never more than one model is in memory: `measure_live` with the run's own model,
`write_adapters` with the static adapters on the same backbone, and what is made of these.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qmixlora.errors import UserError
from qmixlora.files import check_can_be_written, clear_disk_errors, scratch_folder
from qmixlora.recipe import load_run_recipe
from qmixlora.session import open_tuned_run

from .adapters import write_adapters
from .base import write_base
from .fidelity import Fidelity
from .fingerprints import write_fingerprints
from .forms import MAKERS, are_of_tasks
from .job import FOLDER, Job
from .live import measure_live
from .picker import PICKER, make_picker
from .static import learned_by
from .targets import Request


def export(folder: Path, request: Request, console: Console) -> list[Fidelity]:
    """Export a run as `request` says, into `folder/exports`; returns the fidelity of every export.

    Raises:
        UserError: no such run, task or data; a form that cannot be made of the run; a base that cannot be merged into;
            a full disk.
        OSError: nothing can be written in `folder/exports`, before anything is measured.
        CheckError: a merged checkpoint does not compute what its adapter computes; nothing of it stays.
    """
    makers, recipe = [MAKERS[form] for form in request.forms], load_run_recipe(folder)
    for maker in makers:
        maker.check(recipe, request)
    check_can_be_written(folder / FOLDER)
    session = open_tuned_run(folder)
    job = Job(folder, session.recipe, request, console, session.collator)
    learned = learned_by(session.model, session.anatomy.projector_targets)
    live = measure_live(job, session, learned) if are_of_tasks(request.forms) else []
    full = "Free some space and export again; what is in place is whole."
    with clear_disk_errors(folder / FOLDER, full), scratch_folder(folder / FOLDER) as scratch:
        base = write_base(job, learned) if any(maker.on_base for maker in makers) else None
        for maker in makers:
            if maker.of_run is not None:
                maker.of_run(job, session, learned)
        if not live:
            return []
        adapters = write_adapters(job, session, learned, live, base, scratch)
        picker = make_picker(job, session, live)
        del session  # before other models are loaded
        made, failures = list[Fidelity](), list[UserError]()
        for maker in makers:
            try:
                made += maker.of_adapters(job, adapters) if maker.of_adapters else []
            except UserError as error:  # the other forms are whole, and have their fingerprints and picker
                failures.append(error)
        if made:
            write_fingerprints(job, learned, live, base, adapters, made)
        if made and picker is not None:
            picker.write(folder / FOLDER / PICKER)
        if failures:
            raise failures[0]
        return made
