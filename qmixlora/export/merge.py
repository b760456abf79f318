"""A static adapter added to the weights of its base: an ordinary checkpoint, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy, source_of
from qmixlora.bases import RECORD
from qmixlora.device import default_device
from qmixlora.errors import UserError
from qmixlora.files import link_or_copy, write_json
from qmixlora.manifest import MANIFEST
from qmixlora.recipe import Model
from qmixlora.serving.fingerprint import FINGERPRINT

from .checkpoint import OTHER_WEIGHTS, Checkpoint, Entry, as_tensor, open_checkpoint
from .fidelity import FIDELITY
from .low_rank import LowRank
from .static import StaticAdapter

Base = Literal["original", "nf4"]
OF_AN_EXPORT = {"recipe.yaml", FIDELITY, FINGERPRINT, MANIFEST, RECORD}
BLOCK = 2**20  # weights at a time, in all that needs more memory than the tensor itself


@dataclass(frozen=True)
class Merge:
    """A merge of `adapter` into the tensors of `spec`'s checkpoint, as read from the disk (`original`) or after the
    round trip through NF4 that training saw (`nf4`).
    """

    adapter: StaticAdapter
    spec: Model
    base: Base

    def write(self, folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write the merged checkpoint into `folder`; `on_progress` is told bytes done and bytes in all.

        The processor's and generation's files are copied as they are, the config without its quantisation; shards in
        which nothing changes are hard links where the file system allows it. One tensor is in memory at a time. Names
        are those of the base, or the hub's where it has others; shapes and dtypes stay, sums are made in fp32.

        Raises:
            UserError: the base cannot be read, or is quantised; a module of the adapter has no tensor of its own in it,
                or of another shape; a merged tensor is not finite.
        """
        checkpoint, rounded = self._open()
        changed = {f"{layer}.weight" for layer in self.adapter.updates} | rounded
        changed |= self.adapter.modules.keys() | self.adapter.in_base.keys()
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(entry.length for shard in checkpoint.shards for entry in shard.entries)
        done, merged = 0, set()
        for shard in checkpoint.shards:
            path, header = folder / shard.path.name, shard.header_with(checkpoint.hub_names)
            own = {checkpoint.names.get(entry.name, "") for entry in shard.entries} & changed
            if not own and header == shard.header:
                link_or_copy(shard.path, path)
                on_progress(done := done + sum(entry.length for entry in shard.entries), total)
                continue
            with path.open("wb") as file:
                file.write(header)
                for entry, data in shard.read():
                    if (name := checkpoint.names.get(entry.name, "")) in own:
                        self._change(name, entry, data, rounded)
                    file.write(data)
                    del data  # before the next one is read
                    on_progress(done := done + entry.length, total)
            merged |= own
        if missing := sorted(changed - merged):
            raise UserError(
                f"{len(missing)} tensors to merge have no place of their own in the base, such as {missing[0]}.",
                where=str(checkpoint.folder),
                fix="Merge into the base that the run was trained on. If it stores these in another form than the model"
                " has them, export --as lora --projector adapter.",
            )
        _copy_other_files(checkpoint, folder)

    def _open(self) -> tuple[Checkpoint, set[str]]:
        """The base, and the parameters that go through NF4 and back: all that training had in NF4, adapted or not,
        but for experts, which stay as they are.
        """
        config = AutoConfig.from_pretrained(self.spec.id, **source_of(self.spec))
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config, trust_remote_code=self.spec.trust_remote_code)
        anatomy = find_anatomy(skeleton).keeping(self.spec.keep)
        targets = anatomy.in_nf4 if self.base == "nf4" else ()
        return open_checkpoint(self.spec, skeleton), {f"{layer}.weight" for layer in targets}

    def _change(self, name: str, entry: Entry, data: bytearray, rounded: set[str]) -> None:
        """Change one tensor in its bytes."""
        layer, weight = name.removesuffix(".weight"), as_tensor(entry, data)
        if name in rounded:
            nf4_round_trip(weight, getattr(torch, self.spec.dtype), default_device())
        whole = self.adapter.modules | self.adapter.in_base
        if name in whole:
            _check_shape(whole[name].shape, weight, entry)
            weight.copy_(whole[name])
        elif layer in self.adapter.updates:
            update = self.adapter.updates[layer]
            _check_shape(torch.Size((len(update.up_OK), update.down_KI.shape[1])), weight, entry)
            add_update(weight, update)
        if not all(bool(part.isfinite().all()) for part in weight.view(-1).split(BLOCK)):
            raise UserError(f"{entry.name} is not finite after merging.", where=self.spec.id, fix="Do not use it.")


def add_update(weight_OI: Tensor, update: LowRank) -> None:
    """Add an update to a weight in place: summed in fp32, some rows at a time, rounded once."""
    rows = max(1, BLOCK // weight_OI.shape[1])
    down_KI = update.down_KI.float().cpu()
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        weight_OI[part] = (weight_OI[part].float() + update.up_OK[part].float().cpu() @ down_KI).to(weight_OI.dtype)


def nf4_round_trip(weight: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Send a weight, in place, to NF4 with double quantisation and back, as `load_backbone` does.

    On the device that the adapter was measured on: bitsandbytes' quantisers for CPU and CUDA differ in the last bit of
    a scale, and some codes with it. Its quantiser on the CPU compares every weight with 16 levels in memory, so a part
    of the weight goes at a time; the scales of all parts are then quantised together, as it does for a whole tensor
    (`compress_statistics`): the result is the same to the bit.
    """
    flat = weight.view(-1)
    starts = range(0, len(flat), BLOCK)
    # of one piece each: what stays of every part would lie between the next ones' temporary memory, and keep it
    packed = torch.empty(-(-len(flat) // 2), 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-len(flat) // 64), device=device)
    for start in starts:
        part = flat[start : start + BLOCK].to(device, dtype)
        codes, state = bnb.functional.quantize_4bit(part, blocksize=64, quant_type="nf4")
        packed[start // 2 :][: len(codes)] = codes
        scales[start // 64 :][: len(state.absmax)] = state.absmax
    offset = scales.mean()
    scales = bnb.functional.dequantize_blockwise(*bnb.functional.quantize_blockwise(scales - offset, blocksize=256))
    scales += offset
    code = bnb.functional.get_4bit_type("nf4", device=device)
    for start in starts:
        part = flat[start : start + BLOCK]
        state = bnb.functional.QuantState(
            scales[start // 64 :][: -(-len(part) // 64)],
            shape=part.shape,
            dtype=dtype,
            code=code,
            blocksize=64,
            quant_type="nf4",
        )
        part[:] = bnb.functional.dequantize_4bit(packed[start // 2 :][: -(-len(part) // 2)], state)


def _check_shape(shape: torch.Size, weight: Tensor, entry: Entry) -> None:
    if shape != weight.shape:
        raise UserError(
            f"{entry.name} is {tuple(weight.shape)} in the base checkpoint, and {tuple(shape)} in the adapter.",
            where="export",
            fix="Use the base that the run was trained on.",
        )


def _copy_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything of the base but its weights; `config.json` loses its quantisation."""
    weights = {shard.path.name for shard in checkpoint.shards}
    for path in sorted(checkpoint.folder.iterdir()):
        other_weights = any(fnmatch(path.name, form) for form in (*OTHER_WEIGHTS, "*.safetensors"))
        ours = path.name in OF_AN_EXPORT  # where the base is itself one
        if not path.is_file() or path.name in weights or other_weights or ours or path.name.endswith(".index.json"):
            continue
        shutil.copyfile(path, folder / path.name)
    if checkpoint.index is not None:
        index = json.loads(checkpoint.index.read_text(encoding="utf-8"))
        names = checkpoint.hub_names
        index["weight_map"] = {names.get(name, name): shard for name, shard in index["weight_map"].items()}
        write_json(folder / checkpoint.index.name, index)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        write_json(folder / "config.json", config)
