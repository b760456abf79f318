"""Conversations of several turns, and the method on them as slow loops: segment by segment, with nothing shared.

The loops cut a sample by its labels alone: a segment ends where a run of labels ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor

from qmixlora.data import IGNORED, IMAGE, Conversation, load_conversations
from qmixlora.mixlora import routed_as
from qmixlora.mixlora.layer import Linear
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session

from .helpers import randomize_with_centers
from .reference import update

QUESTIONS = ["what digit is written ?", "how big is the circle ?", "what is it ?", "what is left ?"]
ANSWERS = ["seven", "large", "red", "top-left"]
TASKS = ["digit", "color"]
ROUTES = ("instruction", "embedding", "task")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # fp32 sums in another order, layer after layer; other gates are off by 0.03


def conversation(recipe: Recipe, *turns: int, tasks: list[str] | None = None) -> Conversation:
    """A conversation about an image: the questions of these numbers, each with its answer."""
    image = load_conversations(str(recipe.data.train))[0]["images"][0]
    spoken: list[Any] = []
    for index, turn in enumerate(turns):
        mark = "" if index else f"{IMAGE}\n"
        spoken += [{"role": "user", "text": mark + QUESTIONS[turn]}, {"role": "assistant", "text": ANSWERS[turn]}]
    row: Conversation = {"turns": spoken, "images": [image], "task": tasks[-1] if tasks else TASKS[0]}
    return {**row, "tasks": tasks} if tasks else row


def up_to(row: Any, answer: int) -> Any:
    """A conversation up to one of its answers."""
    return {**row, "turns": row["turns"][: 2 * answer + 2], "tasks": row.get("tasks", [])[: answer + 1]}


def mixed_rows(recipe: Recipe) -> list[Conversation]:
    """Three turns (of two tasks), one, and two."""
    return [
        conversation(recipe, 0, 1, 2, tasks=["color", "digit", "color"]),
        conversation(recipe, 3),
        conversation(recipe, 2, 0),
    ]


def opened(make_recipe: Callable[..., Recipe], train: dict[str, Any] | None = None, **adapter: Any) -> TunedSession:
    """A session whose adapter is away from its initialisation, centres included."""
    session = open_session(make_recipe(adapter=adapter, train=train or {}), TASKS)
    randomize_with_centers(session.model)
    session.model.eval()
    return session


def padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its padding on the left."""
    rows = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 2}
    for index, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in rows.values():
            value[index] = value[index].roll(value.shape[1] - length)
    return {**batch, **rows}


def logits_of(model: PeftModel, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return result


def passed(session: TunedSession, batch: dict[str, Any], start: int, end: int, cache: Any = None) -> Any:
    """A pass over these columns of a batch, behind what is in the cache."""
    told = {name: batch[name] for name in ("segments", "routing_mask")}
    pixels = {} if start else {"pixel_values": batch["pixel_values"]}
    with torch.no_grad(), routed_as(session.model, batch["tasks"], **told):
        return session.model(
            input_ids=batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
            **pixels,
        )


class Cut(NamedTuple):
    """A segment: its first token, the first of its answer, and the one behind its last."""

    start: int
    answer: int
    end: int


def cuts_of(labels: list[int], attention: list[int]) -> list[Cut]:
    """The segments of a sample; what comes after the last answer belongs to it."""
    start, stop = attention.index(1), len(attention) - attention[::-1].index(1)
    cuts = []
    while any(label != IGNORED for label in labels[start:]):
        answer = next(i for i in range(start, stop) if labels[i] != IGNORED)
        end = next((i for i in range(answer, stop) if labels[i] == IGNORED), stop)
        cuts.append(Cut(start, answer, end))
        start = end
    cuts[-1] = cuts[-1]._replace(end=stop)
    return cuts


def logits_by_hand(session: TunedSession, batch: dict[str, Any]) -> Tensor:
    """The logits of a batch (B x S x V) with every segment's update from the equations."""
    model, config = session.model, session.model.peft_config["default"]
    cuts = [cuts_of(*rows) for rows in zip(batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)]

    def condition(layer: Linear, x_BSI: Tensor, b: int, k: int) -> Tensor:
        if config.route_on == "task":
            label = batch["tasks"][b] if isinstance(batch["tasks"][b], str) else batch["tasks"][b][k]
            return model.base_model.mixlora_task["default"][config.tasks.index(label)]
        ids = batch["input_ids"][b].tolist()
        tokens = [
            i for i in range(cuts[b][k].start, cuts[b][k].answer) if ids[i] != session.backbone.config.image_token_id
        ]
        table_VD = session.backbone.get_input_embeddings().weight
        states = [table_VD[ids[i]] if config.route_on == "embedding" else x_BSI[b, i] for i in tokens]
        if config.route_on == "all":
            states = list(x_BSI[b])
        c = torch.stack(states).mean(dim=0)
        if config.condition_norm == "none":
            return c
        holder = model.base_model if config.route_on == "embedding" else layer
        mean = holder.mixlora_center["default"].mean[0]
        return (c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() - mean

    def forward(layer: Linear, x_BSI: Tensor) -> Tensor:
        out_BSO = layer.base_layer(x_BSI).clone()
        parameters = {
            name: getattr(layer, name)["default"]
            for name in layer.adapter_layer_names
            if "default" in getattr(layer, name)
        }
        for b, own in enumerate(cuts):
            for k, cut in enumerate([Cut(0, 0, x_BSI.shape[1])] if config.route_on == "all" else own):
                out_BSO[b, cut.start : cut.end] += update(
                    x_BSI[b, cut.start : cut.end], condition(layer, x_BSI, b, k), parameters,
                    r=config.r, alpha=config.alpha, pairing=config.pairing, kind=config.gate,
                )  # fmt: skip
        return out_BSO

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad(), patch.object(Linear, "forward", forward):
        result: Tensor = model.get_base_model().forward(**inputs).logits
    return result
