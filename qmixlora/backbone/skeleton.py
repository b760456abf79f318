"""A model without weights: its anatomy, what of its decoder is quantised and adapted, and whether it can be used."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .anatomy import Anatomy, find_anatomy
from .kinds import check_kind, read_config

NEITHER = 0.05  # the share of a decoder's weights that may be neither quantised nor adapted
NO_SDPA = "scaled_dot_product_attention"  # in transformers' refusal (5.23)


@dataclass(frozen=True)
class Shares:
    """The weights of a decoder, embeddings and head apart: those of its linear layers that are in NF4 (and adapted),
    those of its experts in NF4 (not adapted), those that a recipe keeps in 16 bits, those that are none of these, and
    the names of the latter's parameters, the layer's number taken off.
    """

    adapted: int
    experts: int
    kept: int
    neither: int
    names: tuple[str, ...]

    @property
    def of_neither(self) -> float:
        """The share of what is neither."""
        return self.neither / self.all

    @property
    def all(self) -> int:
        """How many there are."""
        return max(1, self.adapted + self.experts + self.kept + self.neither)


def shares_of(model: PreTrainedModel, anatomy: Anatomy) -> Shares:
    """Count the weights of a model's decoder (which may be on meta)."""
    decoder = model.get_submodule(anatomy.language)
    apart = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if (head := model.get_output_embeddings()) is not None:
        apart |= {id(parameter) for parameter in head.parameters()}
    targets = {f"{path}.{kind}" for path in anatomy.in_nf4 for kind in ("weight", "bias")}
    wide = {*anatomy.wide, *(f"{path}.{kind}" for path in anatomy.wide for kind in ("weight", "bias"))}
    adapted = experts = kept = neither = 0
    names: dict[str, int] = {}
    for name, parameter in decoder.named_parameters(prefix=anatomy.language):
        if id(parameter) in apart:
            continue
        if name in targets:
            adapted += parameter.numel()
        elif name in anatomy.experts_in_nf4:
            experts += parameter.numel()
        elif name in wide:
            kept += parameter.numel()
        else:
            neither += parameter.numel()
            if parameter.dim() >= 2:
                short = re.sub(r"\.\d+\.", ".*.", name)
                names[short] = names.get(short, 0) + parameter.numel()
    return Shares(adapted, experts, kept, neither, tuple(sorted(names, key=lambda name: -names[name])))


def make_skeleton(
    config: PretrainedConfig, spec: Model, attention: str | dict[str, str] | None = None
) -> tuple[PreTrainedModel, Anatomy]:
    """The model of a config on the meta device, and its anatomy. `attention` (default: the recipe's) falls back to
    eager where the class has no sdpa, which is said on stderr.

    Raises:
        UserError: the model cannot be tuned: no such decoder and encoder; too much of it is neither quantised nor
            adapted; its kind is refused by name; or a pattern of `model.keep` matches nothing.
        ValueError, ImportError: transformers refuses it otherwise.
    """
    check_kind(config, spec.id)
    try:
        model = _on_meta(config, spec, attention or spec.attention)
    except ValueError as error:
        if NO_SDPA not in str(error):
            raise
        _say_eager(type(config).__name__)
        model = _on_meta(config, spec, "eager")
    anatomy = find_anatomy(model).keeping(spec.keep)
    if spec.quantization == "nf4":
        _check_shares(model, anatomy, spec)
    return model, anatomy


@dataclass(frozen=True)
class Parts:
    """What was found in a model: its parts by their paths, its attention, and the shares of its decoder's weights."""

    kind: str
    language: str
    layers: int
    targets: int
    projectors: tuple[str, ...]
    vision: tuple[str, ...]
    others: tuple[str, ...]
    attention: str
    shares: Shares

    def lines(self) -> list[tuple[str, str]]:
        """(what, found) for people."""
        nf4, experts = self.shares.adapted / self.shares.all, self.shares.experts / self.shares.all
        of_experts = f"{experts:.1%} NF4 and not adapted (experts), " if experts else ""
        of_which = f": {', '.join(self.shares.names[:3])}" if self.shares.of_neither > NEITHER else ""
        return [
            ("model", self.kind),
            ("language model", f"{self.language} ({self.layers} layers, {self.targets} linear layers)"),
            ("projector (trained)", ", ".join(self.projectors) or "none"),
            ("image encoder (frozen)", ", ".join(self.vision)),
            ("others (frozen)", ", ".join(self.others) or "none"),
            ("attention", self.attention),
            (
                "decoder's weights",
                f"{nf4:.1%} NF4 and adapted, {of_experts}{self.shares.of_neither:.1%} neither{of_which}",
            ),
        ]


def parts_of(spec: Model) -> Parts:
    """Find the parts of a model from its config alone.

    Raises:
        UserError: the config cannot be read, or the model cannot be used.
    """
    try:
        config = read_config(spec, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        model, anatomy = make_skeleton(config, spec.model_copy(update={"quantization": "none"}))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The model cannot be looked at: {error}",
            where=f"--model {spec.id}",
            fix="Give a hub id (and be online once) or a local folder of an image-text-to-text model.",
        ) from error
    return Parts(
        type(model).__name__,
        anatomy.language,
        len(anatomy.layers),
        len(anatomy.targets),
        anatomy.projectors,
        anatomy.vision,
        anatomy.others,
        str(model.config._attn_implementation),
        shares_of(model, anatomy),
    )


@cache
def _say_eager(kind: str) -> None:
    print(f"{kind}: no sdpa in this class; model.attention: eager is used.", file=sys.stderr)


def _on_meta(config: PretrainedConfig, spec: Model, attention: str | dict[str, str]) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=attention,
            trust_remote_code=spec.trust_remote_code,
        )
    return model


def _check_shares(model: PreTrainedModel, anatomy: Anatomy, spec: Model) -> None:
    shares = shares_of(model, anatomy)
    if shares.of_neither > NEITHER:
        raise UserError(
            f"{shares.of_neither:.0%} of the decoder's weights would be neither NF4 nor adapted: "
            f"{', '.join(shares.names[:2])} are neither linear layers nor experts that can be quantised, "
            "and stay in 16 bits.",
            where=f"model.id: {spec.id}",
            fix="Use a dense model of the family; or model.quantization: none, which adapts the linear layers alone.",
        )
