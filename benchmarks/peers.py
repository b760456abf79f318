"""Peaks at the conditions of other tools' logs, planned; `python -m benchmarks.peers` writes docs/memory.md's table.

Two samples at a time, with a picture of about 160 x 40 and text, 256 tokens; 8-bit Adam; every linear layer of the
decoder; tensors alone, without the CUDA context. A model is left out where the planner does not know it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import Plan, plan
from qmixlora.memory.architectures import ARCHITECTURES
from qmixlora.recipe import edited, validate

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
    Peer("google/gemma-4-E4B-it", "1 x 512 tokens, 280 of the picture", ONE, 512, 10.78),
    Peer("google/gemma-4-31B-it", "1 x 512 tokens, 280 of the picture", ONE, 512, 21.36),
    Peer(
        "OpenGVLab/InternVL3_5-8B-HF", "2 x 2,048 tokens, 256 of the picture", (*TWO, "data.max_image_tokens=256"),
        2048, 8.21, "Axolotl",
    ),
    Peer(QWEN25_7B, "1 x 640 tokens, 512 of the picture", (*ONE, "data.max_image_tokens=512"), 640, None, ""),
    Peer("Qwen/Qwen3.5-27B", "1 x 640 tokens, 512 of the picture", (*ONE, "data.max_image_tokens=512"), 640, None, ""),
)  # fmt: skip


def planned(peer: Peer, *edits: str) -> Plan:
    """The plan of a recipe at the peer's conditions, with those edits that this model has."""
    recipe = edited(validate({"model": {"id": peer.model}, "data": {"train": "-"}}, peer.model), peer.edits)
    try:
        return plan(edited(recipe, edits), tokens=peer.tokens)
    except UserError:  # which it has is found one by one
        had: list[str] = []
        for edit in edits:
            with suppress(UserError):
                plan(edited(recipe, [*had, edit]), tokens=peer.tokens)
                had.append(edit)
        return plan(edited(recipe, had), tokens=peer.tokens)


def row(peer: Peer) -> str:
    """A line of the table."""
    kinds = (LORA, (), HARMLESS, (*HARMLESS, *ROUNDED))
    theirs = "" if peer.figure is None else f"{peer.figure:.2f} ({peer.tool})"
    ours = " | ".join(f"{planned(peer, *edits).tensors / GIB:.2f}" for edits in kinds)
    return f"| {peer.model} | {peer.conditions} | {theirs} | {ours} |"


HEAD = (
    "| model | conditions | published | PEFT QLoRA r=16, planned | mixture E=16 R=4, planned | and levers "
    "that change nothing | and int8 head and tower, projector as LoRA |\n|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Plan every peer that the planner knows, each printed when it is, and write the table."""
    lines = [HEAD]
    for peer in PEERS:
        if peer.model in ARCHITECTURES:
            lines.append(row(peer))
            print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, after = "\n".join(lines), rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
