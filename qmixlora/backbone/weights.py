"""The weights of a model as they lie on the disk: their files, and a digest that tells whether they are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from qmixlora.recipe import Model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SLICES, SLICE = 4096, 4096  # that are read of all tensors together, and bytes of one: some MB, however large the model
WEIGHTS, COMMIT = "weights", "commit"  # what is recorded of a base


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: what safetensors' header says of it, and where its bytes begin and how many they are."""

    told: str
    path: Path
    start: int
    length: int


def weight_files(folder: Path, config: PretrainedConfig) -> tuple[Path | None, list[str]]:
    """(the index, if there is one, and the names of the safetensors files) that transformers loads from a folder, in
    its order of preference. Some of them may be missing.
    """
    named = getattr(config, "transformers_weights", None)
    first = named or next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), SINGLE)
    index = folder / first if first.endswith(".index.json") and (folder / first).is_file() else None
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index else {}
    return index, sorted(set(weight_map.values())) or [first]


def recorded(spec: Model, config: PretrainedConfig) -> dict[str, str]:
    """What tells a model that was loaded, with its `config`, from another: a digest of its weights; and of one on the
    hub, the commit. Empty where its files cannot be found.
    """
    folder, commit = Path(spec.id), {}
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(spec.id, revision=spec.revision, local_files_only=True))  # in the cache
            commit = {COMMIT: folder.name}
        _, names = weight_files(folder, config)
        digest = digest_of([folder / name for name in names])
    except (OSError, ValueError, KeyError, TypeError):  # it was loaded from elsewhere
        return {}
    return {WEIGHTS: digest, **commit}


def digest_of(files: Sequence[Path]) -> str:
    """What tells weights apart: every tensor's name, kind and shape, and slices of its bytes, spread over it. The same
    tensors in other files have the same digest.
    """
    tensors = sorted((tensor for path in files for tensor in _stored(path)), key=lambda tensor: tensor.told)
    of_each = max(1, SLICES // max(1, len(tensors)))
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.told.encode())
        last = max(0, tensor.length - SLICE)
        count = min(of_each, -(-tensor.length // SLICE))
        with tensor.path.open("rb", buffering=0) as file:
            for number in range(count):
                at = last // 2 if count == 1 else last * number // (count - 1)
                file.seek(tensor.start + at)
                digest.update(file.read(min(SLICE, tensor.length)))
    return digest.hexdigest()[:32]


def _stored(path: Path) -> Iterator[_Stored]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, item in header.items():
        if name != "__metadata__":
            start, end = item["data_offsets"]
            told = json.dumps([name, item["dtype"], item["shape"]])
            yield _Stored(told, path, 8 + size + start, end - start)
