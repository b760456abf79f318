"""Will it fit: the peak of a run's training step, where it goes, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qmixlora.data import IGNORED
from qmixlora.errors import UserError
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import Session, adapter_config, assemble
from qmixlora.training import enable_checkpointing

from .architectures import config_of
from .cards import GIB
from .pictures import kinds_of_tokens, picture
from .simulation import simulate_step
from .skeleton import meta_backbone, tensors_of

CONTEXT = GIB // 2  # what a CUDA process holds beside its tensors; assumed, not measured
MARGIN = 0.08  # of the card: what a plan leaves free
SMALL = 4096  # parameters of fewer elements keep 32-bit states under an 8-bit optimiser (bitsandbytes)


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak of a training step, by part; `place` is the operation that reached it."""

    parts: dict[str, int]
    place: str
    tokens: int
    card: int | None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak leaves the margin of the card free; None without a card."""
        return None if self.card is None else self.peak <= (1 - MARGIN) * self.card

    def to_dict(self) -> dict[str, Any]:
        """What `qmixlora plan --json` prints, sizes in GiB."""
        card = None if self.card is None else self.card / GIB
        return {
            "peak_gib": self.peak / GIB,
            "card_gib": card,
            "margin_gib": None if card is None else card - self.peak / GIB,
            "fits": self.fits,
            "parts": {name: size / GIB for name, size in self.parts.items()},
            "place": self.place,
            "tokens": self.tokens,
        }


def plan(recipe: Recipe, *, card: int | None = None, tokens: int | None = None) -> Plan:
    """Plan a recipe without weights, without data and without a GPU, by its own training step.

    `tokens` is the length of every sample, pictures included (default `data.max_length`): one picture each, the text
    half question and half answer. `card` is in bytes.

    Raises:
        UserError: the model's configuration cannot be read, its pictures cannot be planned, or do not fit in `tokens`.
    """
    config = config_of(recipe.model)
    tokens = tokens or recipe.data.max_length
    inputs = batch(config, recipe, tokens)
    session = _session(recipe, config)
    held = tensors_of(session.model)
    saved, step = simulate_step(lambda made: supervised_loss(session.model, made), inputs, [t for _, t in held])
    weights = dict(_weights(held, session))
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trainable)
    # the optimiser's own step holds all gradients; torch's AdamW, which works on lists of tensors, a copy of them too
    own_step = gradients * (2 if recipe.train.optimizer == "adamw" else 1)
    beyond = max(step.bytes, own_step)
    place = step.operation if beyond == step.bytes else "optimizer step"
    parts = {
        **weights,
        "optimizer": _optimizer(trainable, recipe.train.optimizer),
        "activations saved": min(saved, beyond),
        "gradients and transients": beyond - min(saved, beyond),
        "CUDA context (assumed)": CONTEXT,
    }
    return Plan(parts, place, tokens, card)


def batch(config: PretrainedConfig, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """A micro-batch as the collator makes it: one picture per sample, then text, of which the latter half is answer."""
    rows = recipe.train.micro_batch_size
    image_id, count, tensors = picture(config, tokens, rows)
    text = tokens - count
    if text < 4:
        raise UserError(
            f"{tokens} tokens do not hold a picture of {count} and a question.",
            where="data.max_length or --tokens",
            fix=f"Plan with at least {count + 4}.",
        )
    ids_BS = torch.ones(rows, tokens, dtype=torch.long)
    ids_BS[:, 1 : 1 + count] = image_id
    labels_BS = torch.full_like(ids_BS, IGNORED)
    labels_BS[:, -(text // 2) :] = 1
    return {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "labels": labels_BS,
        "routing_mask": labels_BS == IGNORED,
        "tasks": ["plan"] * rows,
        **tensors,
        **kinds_of_tokens(config, ids_BS, image_id),
    }


def _session(recipe: Recipe, config: PretrainedConfig) -> Session:
    """The session that training would open, on the meta device."""
    backbone, anatomy = meta_backbone(config, recipe.model)
    tasks = ["plan", "other"]
    session = assemble(recipe, backbone, None, anatomy, adapter_config(recipe.adapter, anatomy, tasks))
    enable_checkpointing(session)
    session.model.train()
    return session


def _weights(held: list[tuple[str, Tensor]], session: Session) -> Iterator[tuple[str, int]]:
    """(part, bytes) of what lies on the card before the first step."""
    parts = {"NF4 weights": 0, "16-bit weights": 0, "adapter": 0}
    seen: set[int] = set()
    for name, tensor in held:
        key = int(tensor.untyped_storage()._cdata)
        if key in seen:  # tied weights
            continue
        seen.add(key)
        trained = "lora_" in name or ".modules_to_save." in name
        four_bit = tensor.dtype == torch.uint8 or name.endswith(".scales")
        part = "adapter" if trained else "NF4 weights" if four_bit else "16-bit weights"
        parts[part] += tensor.untyped_storage().nbytes()
    yield from parts.items()


def _optimizer(trainable: list[Tensor], name: str) -> int:
    """Two moments of every trained number: fp32, or 8 bits with a scale for every 256."""
    if name == "adamw":
        return sum(8 * p.numel() for p in trainable)
    return sum(8 * p.numel() if p.numel() < SMALL else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trainable)
