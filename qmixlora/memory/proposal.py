"""A recipe for a model, data and card: what fits with margin and is the fastest, what costs accuracy last.

The data is surveyed first; then the planner tries batches and checkpointing, and where not even one sample fits, pulls
levers until it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from datasets import Dataset

from qmixlora.backbone.levers.table import SMALL_CHUNK, Facts, lever_edits, to_the_end
from qmixlora.data import checked, load_split
from qmixlora.data.checking.padding import padding_of
from qmixlora.device import GIB, in_words
from qmixlora.errors import UserError
from qmixlora.parallel import side_by_side
from qmixlora.recipe import Edit, Recipe, steps_of, validate
from qmixlora.session import open_collator

from .advice import plan_with_advice
from .architectures import config_of
from .cards import CARDS, KEPT
from .planner import Plan, plan, room_on
from .simulation.batch import batches_of, synthetic_batch

Preference = Literal["speed", "memory", "quality"]
ANY_LENGTH = 2**17  # tokens: nothing is too long to be surveyed
BATCHES = (8, 4, 2, 1)  # samples at a time
FULL = 2048  # tokens that keep a card busy without checkpointing's recomputation
PADDED = 0.15  # the share of padding from which micro-batches are filled by tokens
STEPS = 300  # that a small data set is seen again for, as long as it is not seen too often
MOST_EPOCHS = 5
BUDGET = 1024  # tokens of an image that is not measured, at most
CHARACTERS, FRAME = 3, 64  # in a token, and tokens of the template and a system prompt, where nothing is measured
HELD_OUT = 0.05  # of the data, for validation
FEW = 60  # samples of which none are held out


@dataclass(frozen=True)
class Measured:
    """What is known of the data: its samples and those that cannot be used; lengths in tokens of some samples, the
    longest, and the most of a sample's images. `estimated`: no processor is here to measure them.
    """

    samples: int
    left_out: int
    lengths: Sequence[int]
    longest: int
    image_tokens: int
    estimated: bool = False
    budget: int | None = None  # that images have to be held to for that estimate

    @property
    def mean(self) -> float:
        """The mean length in tokens."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Proposal:
    """The recipe with its plan; why its values are what they are, by their paths; and what the next card allows."""

    recipe: Recipe
    plan: Plan
    data: Measured
    reasons: dict[str, str]
    samples_of_a_batch: float
    larger_card: str | None

    @property
    def steps(self) -> int:
        """The run's optimiser steps."""
        return steps_of(self.recipe, self.data.samples, self.samples_of_a_batch)


def propose(
    model: str, data: str, card: int, prefer: Preference, output: str, overrides: Sequence[str] = ()
) -> Proposal:
    """Make a recipe that fits a card of so many bytes; `overrides` stay as they are.

    Raises UserError if the data or the model cannot be read, or nothing that was tried fits.
    """
    given = Edit.parse(overrides)
    values = given.put_into({"model": {"id": model}, "data": {"train": data}, "train": {"output": output}})
    recipe = validate(values, "command line")
    measured, reasons = measure(recipe), dict[str, str]()
    recipe = (_of_the_data(measured, reasons) | given).apply(recipe)
    tries = [(size | given).apply(recipe) for size in _sizes(prefer, measured)]
    plans = side_by_side([partial(_planned, one, card) for one in tries])
    fitting = [(one, its) for one, its in zip(tries, plans, strict=True) if its is not None and its.fits]
    if fitting:
        recipe, chosen = fitting[0]
        larger = _more_on_a_larger_card(tries, plans, recipe, card)
        _why(recipe, prefer, reasons)
        by_tokens = (_by_tokens(recipe, measured) | given).apply(recipe)
        if prefer != "memory" and by_tokens != recipe and (its := _planned(by_tokens, card)) and its.fits:
            recipe, chosen = by_tokens, its
            reasons["train.batch_tokens"] = "samples differ in length: filled by tokens, less of a batch is padding"
    else:
        recipe, chosen = _with_levers(tries[-1], card, prefer, reasons)
        larger = _without_levers(plans, card)
    samples = _samples_of_a_batch(recipe, measured)
    recipe = (_schedule(recipe, measured, samples, reasons) | given).apply(recipe)
    return Proposal(recipe, chosen, measured, reasons, samples, larger)


def _planned(recipe: Recipe, card: int) -> Plan | None:
    """The plan of the recipe's worst batch; None where its values are not for this model or data."""
    try:
        plans = [plan(recipe, card=card, batch=batch) for batch in batches_of(recipe, config_of(recipe.model), None)]
    except UserError:
        return None
    return max(plans, key=lambda candidate: candidate.peak_with_loading)


def _why(recipe: Recipe, prefer: Preference, reasons: dict[str, str]) -> None:
    """Say why as many samples at a time, with or without checkpointing."""
    few = "one at a time takes the least memory" if prefer == "memory" else "as many at a time as fit with margin"
    reasons["train.micro_batch_size"] = few
    reasons["train.checkpointing.enabled"] = (
        "layers are computed again in the backward pass, which saves their activations"
        if recipe.train.checkpointing.enabled
        else "everything fits without, and a step takes about a quarter less time"
    )


def measure(recipe: Recipe) -> Measured:
    """Look at the training data. Raises UserError if it cannot be read, or holds nothing."""
    whole = recipe.data.model_copy(update={"max_length": ANY_LENGTH, "on_bad_sample": "skip", "validation": None})
    try:
        collator = open_collator(recipe)
    except (UserError, OSError, ValueError, ImportError):
        return _estimated(recipe, load_split(whole, "train"))
    found = checked(whole, collator, ["train"]).verdicts["train"]
    if found.survey is None:
        raise found.refusals.error(str(recipe.data.train), any_left=False)
    facts = found.survey
    return Measured(facts.samples, found.refusals.count, facts.lengths, facts.most_tokens, facts.most_image_tokens)


def _estimated(recipe: Recipe, rows: Dataset) -> Measured:
    """Lengths by characters and the largest image of the model's family; where that may have any size, by one that is
    held to `BUDGET` tokens.
    """
    config, budget = config_of(recipe.model), None
    of_image, of_larger = (synthetic_batch(config, recipe, tokens).image_tokens for tokens in (4 * BUDGET, 8 * BUDGET))
    if of_larger > of_image:
        of_image = budget = BUDGET
    texts = [sum(len(turn["text"]) for turn in turns) // CHARACTERS + FRAME for turns in rows["turns"]]
    images = [len(own) * of_image for own in rows["images"]]
    lengths = [text + image for text, image in zip(texts, images, strict=True)]
    return Measured(len(rows), 0, lengths, max(lengths), max(images), estimated=True, budget=budget)


def _of_the_data(measured: Measured, reasons: dict[str, str]) -> Edit:
    """Length, what is held out, and what cannot be used."""
    about = "about (estimated: no processor of this model is here) " if measured.estimated else ""
    values: dict[str, Any] = {"data.max_length": max(64, math.ceil(measured.longest / 64) * 64)}
    reasons["data.max_length"] = f"the longest sample has {about}{measured.longest} tokens"
    if measured.left_out:
        values["data.on_bad_sample"] = "skip"
        reasons["data.on_bad_sample"] = f"{measured.left_out} samples cannot be used; `qmixlora data` lists them"
    if measured.samples >= FEW:
        values["data.validation"] = HELD_OUT
        reasons["data.validation"] = "a share that is held out, never parting samples that share an image"
    if measured.image_tokens:
        most = measured.image_tokens
        reasons["data.max_image_tokens"] = f"images are not scaled down: a sample's take {most} at most"
    if measured.budget is not None:
        values["data.max_image_tokens"] = measured.budget
        reasons["data.max_image_tokens"] = "larger images are scaled down, as long as nothing is measured"
    return Edit(values)


def _sizes(prefer: Preference, measured: Measured) -> list[Edit]:
    """Checkpointing and samples at a time, in the order in which they are taken; the least memory comes last."""
    least = {"train.checkpointing.enabled": True, "train.micro_batch_size": 1}
    if prefer == "memory":
        return [Edit({**least, "train.loss_chunk": SMALL_CHUNK})]
    most = [count for count in BATCHES if count <= max(1, measured.samples // 8)]
    busy = [count for count in most if count * measured.mean >= FULL or count == most[0]]
    sizes = [*((False, count) for count in busy), *((True, count) for count in most)]
    return [Edit({"train.checkpointing.enabled": again, "train.micro_batch_size": count}) for again, count in sizes]


def _by_tokens(recipe: Recipe, measured: Measured) -> Edit:
    """Micro-batches by tokens, as large as those by samples, where much of these is padding."""
    count = recipe.train.micro_batch_size
    if count == 1 or padding_of(measured.lengths, recipe.train).shuffled < PADDED:
        return Edit({})
    return Edit({"train.batch_tokens": count * recipe.data.max_length, "train.micro_batch_size": 1})


def _with_levers(recipe: Recipe, card: int, prefer: Preference, reasons: dict[str, str]) -> tuple[Recipe, Plan]:
    """The recipe with the smallest set of levers with which it fits, or with one after the other until it does; those
    that change nothing of what is learned first, and where quality is preferred, alone.

    Raises UserError where there is no such set.
    """
    advice = plan_with_advice(recipe, card=card)
    together = advice.smallest_that_learns_the_same or advice.smallest
    if together is not None and (together.learns_the_same or prefer != "quality"):
        cost = "what is learned stays the same" if together.learns_the_same else "may cost accuracy"
        reasons |= dict.fromkeys(together.edit.values, f"needed for this card; {cost}")
        return together.edit.apply(recipe), together.plan
    facts = Facts(int(config_of(recipe.model).get_text_config().num_hidden_layers), advice.plan.batch.image_tokens)
    levers = [lever for lever, _ in lever_edits(recipe, facts) if lever.learns_the_same or prefer != "quality"]
    for lever in sorted(levers, key=lambda lever: not lever.learns_the_same):
        edit = to_the_end(lever, recipe, facts)
        with suppress(UserError):  # an edit that does not go with those before it
            if (its := _planned(edit.apply(recipe), card)) is not None:
                recipe = edit.apply(recipe)
                cost = "what is learned stays the same" if lever.learns_the_same else "may cost accuracy"
                reasons |= dict.fromkeys(edit.values, f"needed for this card; {cost}")
                if its.fits:
                    return recipe, its
    raise UserError(
        f"No set of levers was found with which a sample of {advice.plan.batch.tokens} tokens fits this card: without "
        f"any it takes {in_words(advice.plan.peak_with_loading)} of {in_words(card)}.",
        where=f"model.id: {recipe.model.id}",
        fix="Take a smaller model or a larger card, or set data.max_image_tokens or data.max_length"
        + (", or prefer speed: some levers may cost accuracy." if prefer == "quality" else "."),
    )


def _samples_of_a_batch(recipe: Recipe, measured: Measured) -> float:
    if recipe.train.batch_tokens is None:
        return recipe.train.micro_batch_size
    return padding_of(measured.lengths, recipe.train).samples_by_tokens or 1.0


def _schedule(recipe: Recipe, measured: Measured, samples: float, reasons: dict[str, str]) -> Edit:
    """Steps that suit the size of the data: how large and how many, and when to log, evaluate and save."""
    effective = 16 if measured.samples >= 1000 else 8 if measured.samples >= 200 else 4
    times = max(1, round(effective / samples))
    one_epoch = max(1, math.ceil(measured.samples / samples / times))
    epochs = min(MOST_EPOCHS, max(1, math.ceil(STEPS / one_epoch)))
    steps = epochs * one_epoch
    reasons["train.gradient_accumulation"] = f"an optimiser step on about {round(samples * times)} samples"
    reasons["train.epochs"] = f"{measured.samples} samples: about {steps} steps in all"
    values: dict[str, Any] = {
        "train.epochs": epochs,
        "train.gradient_accumulation": times,
        "train.log_every": max(1, steps // 50),
        "train.save_every": min(500, max(1, steps // 4)),
    }
    if recipe.data.validation:
        values["train.eval_every"] = min(500, max(1, steps // 4))
    return Edit(values)


def _more_on_a_larger_card(
    tries: Sequence[Recipe], plans: Sequence[Plan | None], chosen: Recipe, card: int
) -> str | None:
    """What comes before the choice in the order of preference, and fits the next larger card."""
    room, size = _next_card(card)
    for one, its in zip(tries, plans, strict=True):
        if one == chosen:
            return None
        if its is not None and its.peak_with_loading <= room:
            spec = one.train
            how = "with" if spec.checkpointing.enabled else "without"
            return f"{size} GB would allow {spec.micro_batch_size} samples at a time {how} checkpointing."
    return None


def _without_levers(plans: Sequence[Plan | None], card: int) -> str:
    """What the next larger card would take without levers."""
    room, size = _next_card(card)
    least = plans[-1]
    if least is not None and least.peak_with_loading <= room:
        return f"{size} GB would need none of these levers."
    return f"{size} GB would need levers, too." if size else "No larger consumer card is in the list."


def _next_card(card: int) -> tuple[int, int]:
    """(room for a plan in bytes, GB as printed on the box) of the next larger card; zeros where there is none."""
    sizes = {int(size * GIB * (1 - KEPT)): size for size in CARDS.values()}
    larger = min((own for own in sizes if own > card), default=None)
    return (0, 0) if larger is None else (room_on(larger), sizes[larger])
