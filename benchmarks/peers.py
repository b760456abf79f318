"""Peaks at the conditions of other tools' logs, planned; `python -m benchmarks.peers` writes docs/memory.md's table.

Two samples at a time, with a picture of about 160 x 40 and text, 256 tokens; 8-bit Adam; every linear layer of the
decoder; tensors alone, without the CUDA context. A model is left out where the planner does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import plan
from qmixlora.memory.architectures import ARCHITECTURES
from qmixlora.recipe import Recipe, edited, validate

from .cases import EIGHT_BIT, LORA, QWEN3_8B, QWEN25_7B

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- peers -->", "<!-- end peers -->"
TWO = ("train.micro_batch_size=2", "train.gradient_accumulation=4", EIGHT_BIT)
ONE = ("train.micro_batch_size=1", "train.gradient_accumulation=8", EIGHT_BIT)
SMALL = "data.max_image_tokens=32"
HARMLESS = ("model.offload_embeddings=true", "train.loss_chunk=32", "train.mlp_chunk=256")
ROUNDED = ("model.quantize_lm_head=int8", "model.quantize_vision=int8", "adapter.projector=lora")


@dataclass(frozen=True)
class Peer:
    """Another tool's figure for a model (GiB; None where it has none), its conditions, and our edits for them."""

    model: str
    conditions: str
    edits: tuple[str, ...]
    tokens: int
    figure: float | None
    tool: str = "Unsloth's log"


PEERS = (
    Peer(QWEN25_7B, "2 x 256 tokens, 32 of the picture", (*TWO, SMALL), 256, 6.48),
    Peer(QWEN3_8B, "2 x 256 tokens, 32 of the picture", (*TWO, SMALL), 256, 8.21),
    Peer("google/gemma-3-4b-it", "1 x 512 tokens, 256 of the picture", ONE, 512, 6.06),
    Peer("google/gemma-4-31B-it", "1 x 512 tokens, 256 of the picture", ONE, 512, 21.36),
    Peer(
        "OpenGVLab/InternVL3_5-8B-HF", "2 x 2,048 tokens, 256 of the picture", (*TWO, "data.max_image_tokens=256"),
        2048, 8.21, "Axolotl",
    ),
    Peer(QWEN25_7B, "1 x 640 tokens, 512 of the picture", (*ONE, "data.max_image_tokens=512"), 640, None, ""),
    Peer("Qwen/Qwen3.5-27B", "1 x 640 tokens, 512 of the picture", (*ONE, "data.max_image_tokens=512"), 640, None, ""),
)  # fmt: skip


def recipe_of(peer: Peer, *edits: str) -> Recipe:
    """A recipe at the peer's conditions, with those edits that this model has; the others are left out."""
    recipe = edited(validate({"model": {"id": peer.model}, "data": {"train": "-"}}, peer.model), peer.edits)
    for edit in edits:
        recipe = _if_possible(recipe, edit, peer.tokens)
    return recipe


def _if_possible(recipe: Recipe, edit: str, tokens: int) -> Recipe:
    changed = edited(recipe, [edit])
    try:
        plan(changed, tokens=tokens)
    except UserError:
        return recipe
    return changed


def tensors_of(recipe: Recipe, tokens: int) -> float:
    """The planned peak in GiB, without the context."""
    return plan(recipe, tokens=tokens).tensors / GIB


def row(peer: Peer) -> str:
    """A line of the table."""
    kinds = (
        recipe_of(peer, *LORA), recipe_of(peer), recipe_of(peer, *HARMLESS), recipe_of(peer, *HARMLESS, *ROUNDED)
    )  # fmt: skip
    theirs = "" if peer.figure is None else f"{peer.figure:.2f} ({peer.tool})"
    ours = " | ".join(f"{tensors_of(recipe, peer.tokens):.2f}" for recipe in kinds)
    return f"| {peer.model} | {peer.conditions} | {theirs} | {ours} |"


def table() -> str:
    """All rows that can be planned."""
    head = (
        "| model | conditions | published | PEFT QLoRA r=16, planned | mixture E=16 R=4, planned | and levers "
        "that change nothing | and int8 head and tower, projector as LoRA |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(row(peer) for peer in PEERS if peer.model in ARCHITECTURES)])


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
