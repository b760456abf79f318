"""The files of a Hugging Face checkpoint: where each parameter of the model lies, read and written one by one.

safetensors' own writer wants a whole shard in memory. Its format is a length, a JSON header and the tensors' bytes, and
a merged tensor is as long as the one it replaces: the header is written again as it was, and the bytes after it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from qmixlora.backbone import weight_files
from qmixlora.errors import UserError
from qmixlora.files import replacing
from qmixlora.recipe import Model

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")
IMAGE_ENCODER = "vision_model"  # of CLIP and its kin, in the hub's checkpoints
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
        self._described: dict[str, Any] = json.loads(text)
        described = {name: item for name, item in self._described.items() if name != "__metadata__"}
        order = sorted(described.items(), key=lambda item: item[1]["data_offsets"])
        self.entries = [
            Entry(name, item["dtype"], tuple(item["shape"]), item["data_offsets"][1] - item["data_offsets"][0])
            for name, item in order
        ]

    def header_with(self, names: Mapping[str, str]) -> bytes:
        """The header with other names for some tensors."""
        if names.keys().isdisjoint(self._described):
            return self.header
        text = json.dumps({names.get(name, name): item for name, item in self._described.items()}).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text

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
    """A checkpoint folder and its shards, which `index` names (None: it is one file); `names` gives, for each tensor on
    the disk, its parameter in the model.

    Left out are tensors that transformers converts while loading (stacks, splits, transposes): they are not parameters.
    `hub_names` are those of tensors that are called otherwise in the hub's checkpoints of this kind of model.
    """

    folder: Path
    index: Path | None
    shards: tuple[Shard, ...]
    names: dict[str, str]
    hub_names: dict[str, str]


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
    return read_checkpoint(folder, skeleton)


def read_checkpoint(folder: Path, skeleton: PreTrainedModel) -> Checkpoint:
    """The checkpoint in a folder, of the model that `skeleton` is: the files that transformers loads.

    Raises UserError if they are no safetensors, or are not there.
    """
    index, files = weight_files(folder, skeleton.config)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"The base checkpoint has no {missing[0]}.",
            where=str(folder),
            fix="Only safetensors checkpoints can be merged; convert it, or download it again.",
        )
    shards = tuple(Shard(folder / name) for name in files)
    rules = get_model_conversion_mapping(skeleton) or []
    names = _parameters(skeleton, rules, [entry.name for shard in shards for entry in shard.entries])
    return Checkpoint(folder, index, shards, names, _hub_names(rules, names))


def take_hub_names(folder: Path, model: PreTrainedModel) -> None:
    """Give the tensors of a model that was never loaded, saved in a folder in one file, the names that they have on the
    hub.
    """
    checkpoint = read_checkpoint(folder, model)
    (shard,) = checkpoint.shards
    with replacing(shard.path) as temporary, temporary.open("wb") as file, shard.path.open("rb") as before:
        file.write(shard.header_with(checkpoint.hub_names))
        before.seek(len(shard.header))
        shutil.copyfileobj(before, file)


def _hub_names(rules: list[Any], names: Mapping[str, str]) -> dict[str, str]:
    """The names on the hub of an image encoder's tensors that lack the prefix which transformers takes off in loading.

    transformers loads both, and saves a model that was never loaded (one trained from scratch) without it; vLLM and
    llama.cpp know the hub's alone.
    """
    renamed = {}
    for rule in rules:
        if not isinstance(rule, PrefixChange) or rule.prefix_to_remove != IMAGE_ENCODER or not rule.scope_prefix:
            continue
        for stored, parameter in names.items():
            _, _, tensor = f".{parameter}".partition(f".{rule.scope_prefix}.")
            owner = stored.removesuffix(f".{tensor}")
            if tensor and owner != stored and not owner.endswith(f".{IMAGE_ENCODER}"):
                renamed[stored] = f"{owner}.{IMAGE_ENCODER}.{tensor}"
    return renamed


def _parameters(skeleton: PreTrainedModel, rules: list[Any], stored: list[str]) -> dict[str, str]:
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
