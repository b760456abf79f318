"""The base of an exported adapter: a checkpoint beside it that has the run's trained projector, or the run's own model.

An adapter on a base of its own has the same `base.json` as that base, which says of which run's projector it is. One on
the model as it is names that in its config, and the run's recipe beside it says how the model is loaded.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import clear_read_errors

BASE, RECORD = "base", "base.json"
ADAPTER_CONFIG, RECIPE = "adapter_config.json", "recipe.yaml"
COPY = "Take a whole copy of the folder, or make it anew."
AGAIN = "Move the base together with its adapters, or export again."


@dataclass(frozen=True)
class Source:
    """A model as stock libraries load it: its folder or hub id, the revision of it on the hub (None: the hub's default
    one), and whether Python code that comes with it may run.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        return self.model if self.revision is None else f"{self.model} at {self.revision}"

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` takes beside the model; tells, once, if code of its repository may run."""
        if self.trust_remote_code:
            _say_that_code_runs(self.model, self.revision)
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def typed(self) -> str:
        """The same arguments as they are typed in Python behind the model, where they are not the defaults."""
        revision = "" if self.revision is None else f", revision={self.revision!r}"
        return revision + (", trust_remote_code=True" if self.trust_remote_code else "")

    def folder_in_shell(self, start: Path = Path()) -> str:
        """The model's folder as a word of a shell script that runs in `start`; one on the hub is fetched for it."""
        if (start / self.model).is_dir():
            return shlex.quote(self.model)
        revision = "" if self.revision is None else f", revision={json.dumps(self.revision)}"
        fetch = f"from huggingface_hub import snapshot_download; print(snapshot_download({json.dumps(self.model)}"
        return f'"$(python -c {shlex.quote(fetch + revision + "))")})"'


@lru_cache
def _say_that_code_runs(model: str, revision: str | None) -> None:
    at = f" at {revision}" if revision else " (model.revision: COMMIT would pin it)"
    print(f"Python code of {model}{at} may run in this process: model.trust_remote_code is true.", file=sys.stderr)


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
    named = Path(named_base(adapter)) if (adapter / ADAPTER_CONFIG).is_file() else adapter.resolve().parent / BASE
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
    config = _config(adapter)
    with clear_read_errors(adapter / ADAPTER_CONFIG, COPY):
        return str(config["base_model_name_or_path"] or "")


def source_below(adapter: Path) -> Source:
    """What an adapter lies on: its own base, else the model that its config names (or, for a file of llama.cpp, the
    recipe beside it), in the revision that the run had.

    Raises:
        UserError: as `own_base`; nothing says what it lies on.
    """
    own, model = own_base(adapter), section_of_recipe(adapter, "model")
    trusted = bool(model.get("trust_remote_code"))
    if own is not None:
        return Source(str(own), None, trusted)
    config = _config(adapter) if (adapter / ADAPTER_CONFIG).is_file() else {}
    named = str(config.get("base_model_name_or_path") or model.get("id") or "")
    if not named:
        raise UserError("Nothing says what this adapter lies on.", where=str(adapter), fix="Export it again.")
    is_of_recipe = named == model.get("id")
    revision = config.get("revision") or (model.get("revision") if is_of_recipe else None)  # which older ones left out
    return Source(named, revision, trusted and is_of_recipe)


def section_of_recipe(export: Path, section: str) -> dict[str, Any]:
    """A section of the run's recipe as it stands in the folder of an export; empty where there is none.

    Raises UserError if it cannot be read.
    """
    path = export / RECIPE
    if not path.is_file():
        return {}
    with clear_read_errors(path, COPY):
        try:
            return dict(yaml.safe_load(path.read_text(encoding="utf-8")).get(section) or {})
        except yaml.YAMLError as error:
            raise ValueError(error) from error


def _config(adapter: Path) -> Mapping[str, Any]:
    path = adapter / ADAPTER_CONFIG
    with clear_read_errors(path, COPY):
        return dict(json.loads(path.read_text(encoding="utf-8")))
