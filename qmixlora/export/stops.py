"""Where generation stops, carried by an export: stock libraries know of it what a generation config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmixlora.evaluation import stop_ids
from qmixlora.files import write_json
from qmixlora.session import Session

GENERATION = "generation_config.json"
CARRIED = "Answers end in a token that the base's own generation does not stop at: give `generate` the eos_token_id of"
CARRIED += f" the export's {GENERATION}."


def carry_stops(folder: Path, session: Session) -> bool:
    """Write into the generation config in `folder` that generation stops where it did in the run, if the checkpoint
    does not know it; returns whether it was necessary.
    """
    own: Any = session.backbone.generation_config.eos_token_id
    known = {own} if isinstance(own, int) else set(own or ())
    stops = stop_ids(session)
    if known >= set(stops):
        return False
    path = folder / GENERATION
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**config, "eos_token_id": stops})
    return True
