"""The base of an exported adapter: a checkpoint beside it that has the run's trained projector, or the run's own model.

An adapter on a base of its own has the same `base.json` as that base, which says of which run's projector it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import clear_read_errors

BASE, RECORD = "base", "base.json"
ADAPTER_CONFIG = "adapter_config.json"
COPY = "Take a whole copy of the folder, or make it anew."
AGAIN = "Move the base together with its adapters, or export again."


def base_record(model: str, revision: str | None, projector: str) -> dict[str, Any]:
    """The contents of `base.json`: the model that a base was made of, and a digest of the projector in it."""
    return {"model": model, "revision": revision, "projector": projector}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `base.json` in the folder of a base or an adapter; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    with clear_read_errors(path, AGAIN):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def own_base(adapter: Path) -> Path | None:
    """The folder of the base that was made for an adapter: beside it, else where the adapter's config says it was; None
    for an adapter that lies on a model as it is.

    Raises:
        UserError: the base is not there, or has another projector.
    """
    record = read_record(adapter)
    if record is None:
        return None
    named = Path(named_base(adapter))
    folders = [adapter.resolve().parent / named.name, named]
    there = [folder for folder in folders if (folder / RECORD).is_file()]
    if not there:
        raise UserError(
            "The base of this adapter, which has the trained projector, is not there.", where=str(folders[0]), fix=AGAIN
        )
    if read_record(there[0]) != record:
        raise UserError(
            "This adapter lies on another base: the one that is there has the projector of another run, or of a later"
            " one.",
            where=f"{adapter}, on {there[0]}",
            fix="Export this task again.",
        )
    return there[0]


def named_base(adapter: Path) -> str:
    """The model that an adapter's config names. Raises UserError if it cannot be read."""
    path = adapter / ADAPTER_CONFIG
    with clear_read_errors(path, COPY):
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"] or "")
