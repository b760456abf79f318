"""The outcome of every stage of a variant: works, is refused by name, or fails."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

from qmixlora.errors import UserError

from .case import Case
from .stages import STAGES
from .variant import Variant

WORKS = "works"


def outcomes(variant: Variant, verbose: bool = False) -> dict[str, str]:
    """Every stage with `works`, `refused: why` or `fails: what`."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(variant, Path(folder))
        for name, stage in STAGES.items():
            try:
                stage(case)
                found[name] = WORKS
            except UserError as error:
                found[name] = f"refused: {error.what}"
            except Exception as error:  # whatever it is, it is the outcome
                found[name] = f"fails: {type(error).__name__}: {str(error).strip()[:300]}"
                if verbose:
                    traceback.print_exc()
            if name == "load" and found[name] != WORKS:
                return dict.fromkeys(STAGES, found[name])
    return found
