"""The one router of a mixture as a file that is read without torch, and a comparison with the model's own.

Shapes: B batch, E = F factors in a pool, D width of the condition, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from qmixlora.backbone.hidden_states import run_body
from qmixlora.data import IMAGE, Collator, Conversation, question_about
from qmixlora.mixlora import MixLoraConfig, MixLoraModel, routed_as
from qmixlora.mixlora.inputs import image_token_ids
from qmixlora.serving.route import scales
from qmixlora.session import TunedSession

from .embeddings import all_embedded

FILE, TOKENIZER = "router.safetensors", "tokenizer.json"
COMPARED = 16  # held-out instructions
INSTRUCTION = "instruction"
WORDS = (
    "The prompt is prompts[0] (prompts[1] where the question has an image) around the instruction, without white space "
    "at its ends; its tokens are those of tokenizer.json, after `begin`, without image_tokens. The condition is the "
    "mean of their rows in `embeddings`{centered}. The score of a factor is the softmax of {router}; the {chosen} "
    "factors of the highest scores work, {weight}. Times `share`, that is the scale of factor-NUMBER.gguf in a "
    "request; of the others it is 0."
)
CENTERED = ", layer-normalised (variance + 1e-5) less `center`"
WEIGHTED = "each with its score over the mean of theirs"


def write_router(session: TunedSession, folder: Path) -> None:
    """Write the router, the input embeddings and the rule, and the tokenizer.

    The embeddings have the bits of the model's own dtype; bfloat16 is stored as 16-bit integers, for numpy's sake.
    """
    tuner, config = _tuner(session)
    name, collator = str(session.model.active_adapter), session.collator
    first = next(layer for layer in tuner.mixlora_layers if name in layer.mixlora_route_A)
    tensors = {"route_A": first.mixlora_route_A[name].detach()}
    if name in (route_B := cast(Any, first).mixlora_route_B):
        tensors["route_B"] = route_B[name].detach()
    if name in tuner.mixlora_center:
        center = cast(Any, tuner.mixlora_center[name])
        center.fold()
        tensors["center"] = center.mean[0]
    tensors["embeddings"] = _embeddings(session)
    tokenizer = Tokenizer.from_str(collator.processor.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    image_tokens = config.image_tokens or image_token_ids(session.backbone.config)
    rule = {**_weighting(config), **_prompts(collator, tokenizer), "image_tokens": image_tokens}
    centered = CENTERED if "center" in tensors else ""
    router = "`route_A` times the condition" + (", and of `route_B`, multiplied" if "route_B" in tensors else "")
    weight = WEIGHTED if rule["is_weighted"] else "each with the weight 1"
    words = WORDS.format(centered=centered, router=router, chosen=rule["chosen"], weight=weight)
    written = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    save_file(written, folder / FILE, {"rule": json.dumps(rule), "words": words})
    tokenizer.save(str(folder / TOKENIZER))


def largest_difference(session: TunedSession, folder: Path, rows: Sequence[Conversation]) -> tuple[float, int]:
    """(the largest difference of a factor's scale between the written router and the model's own, the number of rows
    that were compared): of the first questions that are a conversation of their own.
    """
    tuner, _ = _tuner(session)
    questions, worst = list(_questions(rows, session.collator)), 0.0
    for batch in session.batches(questions):
        inputs, routing = session.collator.routed_prompts(batch)
        with torch.no_grad(), session.evaluating(), routed_as(session.model, **routing):
            run_body(session.model, session.on_device(inputs))
        own_BE = tuner.last_selection()[0].diagonal(dim1=-2, dim2=-1).cpu()
        for row, own_E in zip(batch, own_BE, strict=True):
            left_E = own_E.clone()
            for scale in scales(folder, _parts(row)[1], bool(row["images"])):
                left_E[scale["id"]] -= scale["scale"]
            worst = max(worst, float(left_E.abs().max()))
    return worst, len(questions)


def _tuner(session: TunedSession) -> tuple[MixLoraModel, MixLoraConfig]:
    tuner = cast(MixLoraModel, session.model.base_model)
    return tuner, cast(MixLoraConfig, tuner.peft_config[str(session.model.active_adapter)])


def _embeddings(session: TunedSession) -> Tensor:
    """The input embeddings in the model's own bits (V x D)."""
    tokenizer = session.collator.processor.tokenizer
    whole_VD = torch.cat(list(all_embedded(session, tokenizer)))
    return whole_VD.view(torch.uint16) if whole_VD.dtype == torch.bfloat16 else whole_VD


def _weighting(config: MixLoraConfig) -> dict[str, Any]:
    """How many factors work, whether they are weighted by their scores, and what all weights are multiplied with."""
    dense = config.gate == "dense"
    return {
        "chosen": config.num_factors if dense else config.r,
        "is_weighted": config.gate in ("dense", "weighted"),
        "share": config.r / config.num_factors if dense else 1.0,
    }


def _prompts(collator: Collator, tokenizer: Tokenizer) -> dict[str, Any]:
    """What stands before and after an instruction, without an image and with one; the tokens that begin a prompt."""
    prompts, begin = [], []
    for marks in ("", f"{IMAGE}\n"):
        asked = question_about([], INSTRUCTION)["turns"]
        asked[0]["text"] = marks + INSTRUCTION
        text = collator.template.prompt(asked)
        before, _, after = text.rpartition(INSTRUCTION)
        prompts.append((before, after))
        if not marks:
            tokens = collator.tokens(asked[:-1], prompt=True)
            begin = tokens[: len(tokens) - len(tokenizer.encode(text, add_special_tokens=False).ids)]
    return {"prompts": prompts, "begin": begin}


def _questions(rows: Sequence[Conversation], collator: Collator) -> Iterator[Conversation]:
    """The first rows of one question about one image before it, or about none."""
    compared = 0
    for row in rows:
        before, instruction = _parts(row)
        plain = collator.template.letters.quote(instruction) == instruction
        if len(row["turns"]) == 2 and len(row["images"]) <= 1 and not before.strip() and plain:
            yield row
            compared += 1
        if compared == COMPARED:
            return


def _parts(row: Conversation) -> tuple[str, str]:
    """What stands in a row's question up to its image, and the instruction after it."""
    before, _, instruction = row["turns"][0]["text"].rpartition(IMAGE)
    return before, instruction
