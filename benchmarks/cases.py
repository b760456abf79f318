"""The configurations whose memory is measured: models, levers, batches and cards; on a GPU whole models, without one a
few layers of their widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qmixlora.memory import card_of
from qmixlora.memory.architectures import ARCHITECTURES, config_of
from qmixlora.memory.simulation.depth import at_depth
from qmixlora.recipe import Recipe, edited, load_recipe, validate


@dataclass(frozen=True)
class Configuration:
    """A shipped recipe, on the card of its name, or a model with the default recipe; `layers` of its decoder, or all
    of them; samples of `tokens`, or of `data.max_length`.
    """

    source: str
    overrides: tuple[str, ...] = ()
    tokens: int | None = None
    layers: int | None = None
    vision_layers: int | None = None
    card: str | None = None  # by name, where it is not in the recipe's

    @property
    def on_card(self) -> str | None:
        """The name of the card that torch's allocator is held to."""
        return self.card or card_of(self.source)


LLAVA_7B, QWEN25_7B, QWEN3_8B = (
    "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct",
)  # fmt: skip
EIGHT_BIT = "train.optimizer=adamw_8bit"
CONDITIONAL = (
    "adapter.pairing=conditional", "adapter.gate=straight_through", "adapter.route_on=all", "adapter.r=4",
    "adapter.alpha=8",
)  # fmt: skip
LORA = ("adapter.method=lora", "adapter.r=16")  # plain PEFT
LEVERS = {
    "default": (),
    "8-bit": (EIGHT_BIT,),
    "conditional": (*CONDITIONAL, EIGHT_BIT),
    "no-checkpointing": ("train.checkpointing.enabled=false",),
    "offloaded-activations": ("train.checkpointing.offload=true",),
    "offloaded-embeddings": ("model.offload_embeddings=true",),
    "lora-r16": LORA,
    "lora-r16-8-bit": (*LORA, EIGHT_BIT),
}
RECIPES = (
    "llava-1.5-7b-rtx4060-8gb", "qwen2.5-vl-7b-rtx4060-8gb", "internvl3-8b-rtx4060-8gb", "smolvlm2-2.2b-rtx3070-8gb",
    "llava-1.5-13b-rtx3060-12gb", "qwen3-vl-8b-rtx4070-12gb", "gemma-3-12b-rtx4070-12gb",
    "llava-onevision-7b-rtx4070-12gb", "qwen2.5-vl-32b-rtx4090-24gb", "qwen3-vl-32b-rtx3090-24gb",
)  # fmt: skip
# what peers' logs say: two pictures of about 160 x 40 at a time, their text, r = 16, 8-bit Adam
PEERS = ("train.micro_batch_size=2", "train.gradient_accumulation=4", "data.max_image_tokens=32", EIGHT_BIT)
TOO_SMALL = {  # cards on which a recipe does not run
    "llava-1.5-7b-on-6gb": Configuration(LLAVA_7B, (EIGHT_BIT,), 1024, card="rtx3050-6gb"),
    "qwen3-vl-8b-on-8gb": Configuration(QWEN3_8B, (EIGHT_BIT, "data.max_image_tokens=768"), 1024, card="rtx4060-8gb"),
    "gemma-3-12b-on-8gb": Configuration("google/gemma-3-12b-it", (EIGHT_BIT,), 1024, card="rtx4060-8gb"),
    "internvl3-14b-on-10gb": Configuration(
        "OpenGVLab/InternVL3-14B-hf", (EIGHT_BIT, "data.max_image_tokens=768"), 1024, card="rtx3080-10gb"
    ),
}
GPU = {  # the most important first
    "llava-1.5-7b-default": Configuration(LLAVA_7B, (), 1024),
    "llava-1.5-7b-8-bit": Configuration(LLAVA_7B, (EIGHT_BIT,), 1024),
    **{name: Configuration(name, (EIGHT_BIT,)) for name in RECIPES[:4]},
    "qwen2.5-vl-7b-peers": Configuration(QWEN25_7B, PEERS, 256),
    "qwen2.5-vl-7b-peers-lora": Configuration(QWEN25_7B, (*PEERS, *LORA), 256),
    "qwen3-vl-8b-on-8gb": TOO_SMALL["qwen3-vl-8b-on-8gb"],
    "qwen3-vl-8b-peers": Configuration(QWEN3_8B, PEERS, 256),
    "gemma-3-4b-peers": Configuration("google/gemma-3-4b-it", (*PEERS[:2], EIGHT_BIT), 512),
    **{name: Configuration(name, (EIGHT_BIT,)) for name in RECIPES[4:]},
    **TOO_SMALL,
    **{f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, edits, 1024) for name, edits in LEVERS.items()},
    "llava-1.5-7b-streamed": Configuration(LLAVA_7B, ("model.stream_layers=24", EIGHT_BIT), 1024),
    "qwen2.5-vl-7b-default": Configuration(QWEN25_7B, (EIGHT_BIT,), 1024),
    "qwen2.5-vl-7b-lora-r16": Configuration(QWEN25_7B, (*LORA, EIGHT_BIT), 1024),
}
ON_CPU = ("model.dtype=float32", "adapter.dropout=0", "train.gradient_accumulation=1")
SMALL = (*ON_CPU, "data.max_image_tokens=100")
CPU = {
    "llava-1.5-7b-default": Configuration(LLAVA_7B, ON_CPU[:2], 640, 2, vision_layers=4),
    **{
        f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, (*ON_CPU, *LEVERS[name]), 640, 2, vision_layers=4)
        for name in ("conditional", "lora-r16")
    },
    "qwen2.5-vl-7b": Configuration(QWEN25_7B, SMALL, 384, 2),
    "internvl3-8b": Configuration(
        "OpenGVLab/InternVL3-8B-hf", (*ON_CPU, "data.max_image_tokens=256"), 448, 2, vision_layers=4
    ),
    "gemma-3-4b": Configuration("google/gemma-3-4b-it", ON_CPU, 448, 2, vision_layers=2),
    "qwen3-vl-8b": Configuration(QWEN3_8B, (*SMALL, EIGHT_BIT), 384, 3),  # images' features go to three layers
    "qwen3-vl-8b-two-layers": Configuration(QWEN3_8B, SMALL, 384, 2),  # one of three mergers idle, AdamW at the peak
    **{
        f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, (*ON_CPU, *LEVERS[name]), 640, 2, vision_layers=4)
        for name in ("no-checkpointing", "offloaded-activations")
    },
    "llava-1.5-7b-streamed": Configuration(
        LLAVA_7B, (*ON_CPU, *LEVERS["offloaded-embeddings"], "model.stream_layers=3"), 640, 4, vision_layers=4
    ),
    "smolvlm2-2.2b": Configuration(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct", (*ON_CPU[:2], "data.max_image_tokens=405"), 640, 4
    ),
}


def recipe_of(configuration: Configuration, folder: Path) -> Recipe:
    """The recipe; a model that is cut leaves its configuration in the folder, and goes by its name."""
    if configuration.source in ARCHITECTURES:
        values = {"model": {"id": configuration.source}, "data": {"train": "-"}}
        recipe = edited(validate(values, configuration.source), configuration.overrides)
    else:
        recipe = load_recipe(configuration.source, configuration.overrides)
    if configuration.layers is None:
        return recipe
    config = at_depth(config_of(recipe.model), configuration.layers)
    if configuration.vision_layers is not None:
        config.vision_config.num_hidden_layers = configuration.vision_layers
    config.save_pretrained(folder)
    return edited(recipe, [f"model.id={folder}"])
