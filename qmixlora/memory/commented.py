"""A proposed recipe as a commented file, and in words: what was chosen and why, and how long an epoch takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from transformers import PretrainedConfig

from qmixlora.device import in_words
from qmixlora.recipe import Dumper, Edit, Recipe, leaves

from .planner import room_on
from .proposal import Proposal

# written though they are the defaults, since they are what one changes first
ALWAYS = (
    "model.id", "model.quantization", "adapter.method", "adapter.num_factors", "adapter.r", "adapter.alpha",
    "data.train", "data.max_length", "train.output", "train.epochs", "train.micro_batch_size", "train.learning_rate",
    "train.gradient_accumulation", "train.checkpointing.enabled", "train.log_every", "train.save_every",
)  # fmt: skip
# TFLOPS of a card's bf16 products (fp32 sums), as its maker gives them, without sparsity
PEAK = {
    "rtx3050-6gb": 14, "rtx3050-8gb": 18, "rtx3060-12gb": 25, "rtx3070-8gb": 41, "rtx3080-10gb": 60,
    "rtx3090-24gb": 71, "rtx4060-8gb": 30, "rtx4060ti-16gb": 44, "rtx4070-12gb": 58, "rtx4080-16gb": 97,
    "rtx4090-24gb": 165, "rtx5060ti-16gb": 47, "rtx5070-12gb": 62, "rtx5080-16gb": 113, "rtx5090-32gb": 210,
}  # fmt: skip
STRING = "tag:yaml.org,2002:str"
USED = 0.3  # of that peak: assumed, for NF4 weights that are unpacked at every use


class _Lines(Dumper):
    """One line for each value, behind which there is room for a comment."""


_Lines.add_representer(str, lambda dumper, text: dumper.represent_scalar(STRING, text, '"' if "\n" in text else None))


def text_of(proposal: Proposal, card: str) -> str:
    """The recipe's file: what differs from the defaults and what one changes first, with the reasons."""
    recipe, size = proposal.recipe, in_words(proposal.plan.peak_with_loading)
    head = [
        f"# {recipe.model.id} on {proposal.data.samples} samples, made by `qmixlora new` for {card}.",
        f"# Predicted peak: {size}; {in_words(_left(proposal))} of the card are left. Measured peak: not measured.",
    ]
    head += [f"# {_unused(proposal)}"] * bool(proposal.unused)
    values, default = recipe.model_dump(), _defaults(recipe)
    kept = {
        path: value
        for path, value in leaves(values)
        if path in ALWAYS or path in proposal.reasons or value != default.get(path)
    }
    if recipe.train.batch_tokens is not None:
        del kept["train.micro_batch_size"]
    told = yaml.dump(Edit(kept).put_into({}), Dumper=_Lines, sort_keys=False, allow_unicode=True, width=float("inf"))
    lines = told.splitlines()
    return "\n".join([*head, *_commented(lines, proposal.reasons)]) + "\n"


def words_of(proposal: Proposal, config: PretrainedConfig, card: str | None) -> list[str]:
    """What was chosen and why, a line each."""
    recipe, spec, data = proposal.recipe, proposal.recipe.train, proposal.data
    guess = " (estimated: no processor of this model is here)" if data.estimated else ""
    size = f"{data.samples} samples, {data.mean:.0f} tokens on average, the longest {data.longest}"
    lines = [f"Data: {size}{guess}; {data.tasks} task{'s' * (data.tasks > 1)}."]
    if data.tasks == 1:
        lines.append('Where samples are of several tasks, let each say its own: "task" in a row, or data.columns.task.')
    lines += [_unused(proposal)] * bool(proposal.unused)
    lines += [f"data.train: {doubt}" for doubt in data.doubts]
    values = dict(leaves(recipe.model_dump()))
    lines += [f"{Edit({path: values[path]})}  ({reason})" for path, reason in proposal.reasons.items()]
    plan = proposal.plan
    lines.append(
        f"Planned peak: {in_words(plan.peak_with_loading)}, {in_words(_left(proposal))} of the card are left "
        f"({in_words(plan.card - room_on(plan.card))} are to stay free)."
        if plan.card
        else f"Planned peak: {in_words(plan.peak_with_loading)}."
    )
    epochs = f"{spec.epochs:g} epoch{'s' * (spec.epochs > 1)}"
    lines.append(f"{proposal.steps} optimiser steps in {epochs}. {_time(proposal, config, card)}")
    return [*lines, *([f"Next larger card: {proposal.larger_card}"] if proposal.larger_card else [])]


def _unused(proposal: Proposal) -> str:
    names = ", ".join(map(repr, proposal.unused))
    return f"Columns that are not used: {names} (data.columns and data.template name those that are)."


def _left(proposal: Proposal) -> int:
    assert proposal.plan.card is not None, "a proposal is for a card"
    return proposal.plan.card - proposal.plan.peak_with_loading


def _time(proposal: Proposal, config: PretrainedConfig, card: str | None) -> str:
    """How long an epoch takes, as far as that can be said: by products of the decoder alone."""
    text, mean = config.get_text_config(), proposal.data.mean
    weights = 12 * text.num_hidden_layers * text.hidden_size**2
    passes = 3 if proposal.recipe.train.checkpointing.enabled else 2  # the backward pass has no gradients of weights
    work = 2 * weights * passes * mean * proposal.data.samples
    if card not in PEAK:
        return f"An epoch is about {work / 1e15:.3g} PFLOP in the decoder; the speed of this card is not known."
    minutes = work / (PEAK[card] * 1e12 * USED) / 60
    streamed = " Streamed layers take longer." if proposal.recipe.model.stream_layers else ""
    return f"An epoch takes about {max(1, minutes):.0f} min, if the card reaches {USED:.0%} of its peak.{streamed}"


def _defaults(recipe: Recipe) -> dict[str, Any]:
    values = {"model": {"id": recipe.model.id}, "data": {"train": recipe.data.train}}
    return dict(leaves(Recipe.model_validate(values).model_dump()))


def _commented(lines: list[str], reasons: Mapping[str, str]) -> Iterator[str]:
    """The lines of YAML, those whose value has a reason with it as a comment; sections apart."""
    path: list[str] = []
    for line in lines:
        depth, key = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        path[depth:] = [key]
        if depth == 0:
            yield ""
        reason = reasons.get(".".join(path))
        yield f"{line}  # {reason}" if reason else line
