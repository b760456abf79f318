"""The files of a Hugging Face checkpoint: where each parameter of the model lies, read and written one by one.

safetensors' own writer wants a whole shard in memory. Its format is a length, a JSON header and the tensors' bytes, and
a merged tensor is as long as the one it replaces: the header is written again as it was, and the bytes after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qmixlora.errors import UserError
from qmixlora.recipe import Model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A tensor in a shard: its name there, dtype as safetensors writes it, shape, and length in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


class Shard:
    """One safetensors file: `header` verbatim, and its tensors in the order in which they lie there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.read(8)
            text = file.read(int.from_bytes(size, "little"))
        self.header = size + text
        described = json.loads(text)
        described.pop("__metadata__", None)
        order = sorted(described.items(), key=lambda item: item[1]["data_offsets"])
        self.entries = [
            Entry(name, item["dtype"], tuple(item["shape"]), item["data_offsets"][1] - item["data_offsets"][0])
            for name, item in order
        ]

    def read(self) -> Iterator[tuple[Entry, bytearray]]:
        """Every tensor's bytes, one after the other, into memory of their own (a mapped file would stay resident)."""
        with self.path.open("rb") as file:
            file.seek(len(self.header))
            for entry in self.entries:
                data = bytearray(entry.length)
                _fill(file, data)
                yield entry, data
                del data  # its memory is free once the caller lets go of it


def _fill(file: BinaryIO, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise UserError("A weights file ends too early.", where=file.name, fix="Download it again.")
        view = view[count:]


def as_tensor(entry: Entry, data: bytearray) -> Tensor:
    """The tensor in these bytes, sharing their memory. Raises UserError unless it holds floating-point numbers."""
    if entry.dtype not in DTYPES:
        raise UserError(
            f"{entry.name} is stored as {entry.dtype}: the base checkpoint is itself quantised.",
            where="model.id",
            fix="Train and export from the original 16-bit checkpoint.",
        )
    if math.prod(entry.shape) == 0:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its shards; `names` gives, for each tensor on the disk, its parameter in the model.

    Left out are tensors that transformers converts while loading (stacks, splits, transposes): they are not parameters.
    """

    folder: Path
    shards: tuple[Shard, ...]
    names: dict[str, str]


def open_checkpoint(spec: Model, skeleton: PreTrainedModel) -> Checkpoint:
    """The checkpoint that a recipe's model names, in its folder or the hub's cache (downloaded if it is not there).

    `skeleton` is the model on meta; names on the disk become its parameters' names through transformers' own rules.

    Raises:
        UserError: no such checkpoint, or one without safetensors.
    """
    folder = Path(spec.id)
    if not folder.is_dir():
        try:
            downloaded = snapshot_download(spec.id, revision=spec.revision, ignore_patterns=list(OTHER_WEIGHTS))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"Cannot find the base checkpoint: {error}",
                where=f"model.id: {spec.id}",
                fix="Be online for the download, or put the checkpoint into a local folder of that name.",
            ) from error
        folder = Path(downloaded)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        files = [SINGLE]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"The base checkpoint has no {missing[0]}.",
            where=str(folder),
            fix="Only safetensors checkpoints can be merged; convert it, or download it again.",
        )
    shards = tuple(Shard(folder / name) for name in files)
    return Checkpoint(folder, shards, _parameters(skeleton, [e.name for shard in shards for e in shard.entries]))


def _parameters(skeleton: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    rules = get_model_conversion_mapping(skeleton) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known: dict[str, Any] = skeleton.state_dict()
    names = {}
    for name in stored:
        parameter, pattern = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, known)
        if parameter not in known and name in known:  # as transformers: a name that is right already stays
            parameter, pattern = name, None
        if pattern is None:
            names[name] = parameter
    return names
