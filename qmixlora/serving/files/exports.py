"""The exports in a folder, as a server is told of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qmixlora.bases import ADAPTER_CONFIG, Source, read_record, section_of_recipe, source_below
from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors
from qmixlora.serving.fingerprint import FINGERPRINT, Fingerprint, read_fingerprint

FIDELITY, GENERATION, CONFIG = "fidelity.json", "generation_config.json", "config.json"
PROCESSOR = "processor_config.json"
FORMS = ("-lora", "-gguf", "-merged")  # in which the names of exports end
COPY = "Take a whole copy of the folder, or export again."


@dataclass(frozen=True)
class Adapter:
    """A LoRA for a server to load: a folder of PEFT's, or a GGUF file in a folder.

    `name` is what requests call it, `base` the model that it lies on, `rank` the largest of its layers' (None: the file
    says it). `projector` says where a trained projector is (`base`, `adapter`, `low-rank`; None: there is none, or it
    is not said), `whole_modules` the modules that it has as a whole. `stops` are tokens that its answers end in and its
    base does not stop at, `stop_strings` their texts where they are known; `dtype` is that of the computation (None: it
    is not said), `template_arguments` go to the chat template. `notes` is what was said when it was exported.
    """

    name: str
    path: Path
    base: Source
    rank: int | None = None
    projector: str | None = None
    whole_modules: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    dtype: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None

    @property
    def folder(self) -> Path:
        """The folder of the export."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Exports:
    """A folder of exports: LoRAs of PEFT, LoRAs of llama.cpp, merged checkpoints.

    A form is read when it is asked for, so that one that cannot be read is in the way of its own servers alone.
    """

    folder: Path
    lora_folders: tuple[Path, ...]
    gguf_folders: tuple[Path, ...]
    merged: tuple[Path, ...]

    @cached_property
    def loras(self) -> tuple[Adapter, ...]:
        """Raises UserError for one that cannot be read or has lost its base."""
        return tuple(map(_lora, self.lora_folders))

    @cached_property
    def ggufs(self) -> tuple[Adapter, ...]:
        """Raises UserError as `loras`."""
        return tuple(map(_gguf, self.gguf_folders))


def read_exports(folder: Path) -> Exports:
    """The exports in a folder, or in the `exports/` of a run's.

    Raises:
        UserError: there are none.
    """
    folder = folder / "exports" if (folder / "exports").is_dir() else folder
    if not folder.is_dir():
        raise UserError("There is no such folder.", where=str(folder), fix="Name the folder of a run, or its exports.")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loras = tuple(path for path in folders if (path / ADAPTER_CONFIG).is_file())
    ggufs = tuple(path for path in folders if path.name.endswith("-gguf"))
    merged = tuple(path for path in folders if path.name.endswith("-merged") and (path / CONFIG).is_file())
    if not (loras or ggufs or merged):
        raise UserError("There are no exports.", where=str(folder), fix="Make some: qmixlora export RUN --all.")
    return Exports(folder, loras, ggufs, merged)


def image_limits(folder: Path) -> tuple[int, int] | None:
    """The fewest and the most tokens of an image by the processor in the folder of a base or an export, where that
    limits pixels, as Qwen2-VL's does; None where it does not, or there is none.
    """
    images = _read(folder / PROCESSOR).get("image_processor") or {}
    fewest, most = (images.get("size", {}).get(edge) for edge in ("shortest_edge", "longest_edge"))
    if not (fewest and most and images.get("merge_size")):
        return None
    pixels = (images["patch_size"] * images["merge_size"]) ** 2
    return max(1, -(-fewest // pixels)), max(1, most // pixels)


def _lora(folder: Path) -> Adapter:
    config = _read(folder / ADAPTER_CONFIG)
    return Adapter(
        path=folder,
        rank=max(int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values(), 1),
        whole_modules=tuple(config.get("modules_to_save") or ()),
        **_common(folder),
    )


def _gguf(folder: Path) -> Adapter:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"There is not one GGUF file but {len(files)}.", where=str(folder), fix=COPY)
    return Adapter(path=files[0], **_common(folder))


def _common(folder: Path) -> dict[str, Any]:
    """What an export of any form has beside its weights."""
    fidelity, generation, model = (
        _read(folder / FIDELITY),
        _read(folder / GENERATION),
        section_of_recipe(folder, "model"),
    )
    fingerprint = read_fingerprint(folder) if (folder / FINGERPRINT).is_file() else None
    stops = generation.get("eos_token_id") or ()
    arguments = {} if read_record(folder) else model.get("template_arguments")  # of an own base, its template has them
    return {
        "base": source_below(folder),
        "stops": (stops,) if isinstance(stops, int) else tuple(stops),
        "stop_strings": tuple(generation.get("stop_strings") or ()),
        "dtype": fingerprint.dtype if fingerprint else model.get("dtype"),
        "template_arguments": fingerprint.template_arguments if fingerprint else arguments or {},
        "name": next((folder.name.removesuffix(form) for form in FORMS if folder.name.endswith(form)), folder.name),
        "projector": fidelity.get("projector"),
        "notes": tuple(fidelity.get("notes") or ()),
        "fingerprint": fingerprint,
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with clear_read_errors(path, COPY):
        return dict(json.loads(path.read_text(encoding="utf-8")))
