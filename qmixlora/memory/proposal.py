"""A recipe for a model, data and card: what fits with margin and is the fastest, what costs accuracy last.

The data is surveyed first; then the planner tries batches and checkpointing, and where not even one sample fits, pulls
levers until it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from qmixlora.backbone.levers.table import SMALL_CHUNK, Facts, lever_edits, to_the_end
from qmixlora.data import usual_columns
from qmixlora.data.checking.padding import padding_of
from qmixlora.device import in_words
from qmixlora.errors import UserError
from qmixlora.parallel import side_by_side
from qmixlora.recipe import Edit, Recipe, steps_of, validate

from .advice import plan_with_advice, plan_worst
from .architectures import config_of
from .cards import CARDS, card_bytes
from .evaluation import plan_evaluation
from .measured import Measured, measure
from .planner import Plan, room_on
from .residuals import residual_of
from .simulation.batch import batches_of

Preference = Literal["speed", "memory", "quality"]
BATCHES = (8, 4, 2, 1)  # samples at a time
FULL = 2048  # tokens that keep a card busy without checkpointing's recomputation
PADDED = 0.15  # the share of padding from which micro-batches are filled by tokens
STEPS = 300  # that a small data set is seen again for, as long as it is not seen too often
MOST_EPOCHS = 5
HELD_OUT = 0.05  # of the data, for validation
LEFT_OUT = 0.1  # the share of samples that may be left out without a word of the user
FEW = 60  # samples of which none are held out


@dataclass(frozen=True)
class Proposal:
    """The recipe with its plan; why its values are what they are, by their paths; what the next card allows; and the
    columns of the data that are not used.
    """

    recipe: Recipe
    plan: Plan
    data: Measured
    reasons: dict[str, str]
    samples_of_a_batch: float
    larger_card: str | None
    unused: list[str]

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
    named, reasons = {"model": {"id": model}, "data": {"train": data}, "train": {"output": output}}, dict[str, str]()
    columns, unused = _columns(data, given, reasons)
    recipe = validate((columns | given).put_into(named), "command line")
    measured = measure(recipe)
    recipe = (_of_the_data(measured, recipe, reasons) | given).apply(recipe)
    tries = [(size | given).apply(recipe) for size in _sizes(prefer, measured)]
    residual = residual_of(model)  # asked for before processes are forked, as the data is looked at, once for all tries
    with suppress(UserError):  # as `_planned`
        batches_of(tries[0], config_of(recipe.model), None)
    planned = partial(_planned, card=card, residual=residual)
    plans = side_by_side([partial(planned, one) for one in tries])
    fitting = [(one, its) for one, its in zip(tries, plans, strict=True) if its is not None and its.fits]
    if fitting:
        recipe, chosen = fitting[0]
        larger = _more_on_a_larger_card(tries, plans, recipe, card)
        _why(recipe, prefer, measured, reasons)
        by_tokens = (_by_tokens(recipe, measured) | given).apply(recipe)
        if prefer != "memory" and by_tokens != recipe and (its := planned(by_tokens)) and its.fits:
            recipe, chosen = by_tokens, its
            reasons["train.batch_tokens"] = "samples differ in length: filled by tokens, less of a batch is padding"
    else:
        recipe, chosen = _with_levers(tries[-1], card, planned, prefer, reasons)
        larger = _without_levers(plans, card)
    samples = padding_of(measured.lengths, recipe.train).samples_of_a_batch
    recipe = (_schedule(recipe, measured, samples, reasons) | given).apply(recipe)
    recipe = (_evaluation(recipe, card, residual, reasons) | given).apply(recipe)
    return Proposal(recipe, chosen, measured, reasons, samples, larger, unused)


def _planned(recipe: Recipe, *, card: int, residual: int) -> Plan | None:
    """The plan of the recipe's worst batch; None where its values are not for this model or data."""
    try:
        return plan_worst(recipe, card, residual)
    except UserError:
        return None


def _why(recipe: Recipe, prefer: Preference, measured: Measured, reasons: dict[str, str]) -> None:
    """Say why as many samples at a time, with or without checkpointing."""
    if prefer == "memory":
        why = "one at a time takes the least memory"
    elif recipe.train.micro_batch_size == _most(measured)[0] < BATCHES[0]:
        why = f"of {measured.samples} samples no more at a time: an epoch is to have several steps"
    else:
        why = "as many at a time as fit with margin"
    reasons["train.micro_batch_size"] = why
    reasons["train.checkpointing.enabled"] = (
        "layers are computed again in the backward pass, which saves their activations"
        if recipe.train.checkpointing.enabled
        else "everything fits without, and a step takes about a quarter less time"
    )


def _columns(data: str, given: Edit, reasons: dict[str, str]) -> tuple[Edit, list[str]]:
    """The columns of a table whose names are the usual ones, but for those that are given, with the template that puts
    them together; and the columns that are not used.
    """
    source, prefix = given.values.get("data.train", data), "data.columns."
    if "data.columns" in given.values or not isinstance(source, str):
        return Edit({}), []
    named = {path.removeprefix(prefix): name for path, name in given.values.items() if path.startswith(prefix)}
    template = given.values.get("data.template")
    usual = usual_columns(source, given.values.get("data.subset"), named, template)
    if usual is None:
        return Edit({}), []
    values: dict[str, Any] = {f"{prefix}{key}": name for key, name in usual.columns.items()}
    reasons |= dict.fromkeys(values, "by its name in the data")
    if usual.template != template:
        values["data.template"] = usual.template
        reasons["data.template"] = (
            "all texts that a question may need; lines with nothing in a row's columns are left out"
        )
    return Edit(values), usual.unused


def _of_the_data(measured: Measured, recipe: Recipe, reasons: dict[str, str]) -> Edit:
    """Lengths, what is held out, and what cannot be used."""
    about = "about (estimated: no processor of this model is here) " if measured.estimated else ""
    values: dict[str, Any] = {"data.max_length": max(64, math.ceil(measured.longest / 64) * 64)}
    reasons["data.max_length"] = f"the longest sample has {about}{measured.longest} tokens"
    if measured.longest_answer > recipe.train.max_new_tokens:
        values["train.max_new_tokens"] = measured.longest_answer
        reasons["train.max_new_tokens"] = f"the longest answer has {about}{measured.longest_answer} tokens with its end"
    read = measured.samples + measured.left_out
    if 0 < measured.left_out <= LEFT_OUT * read:  # of more, planning says what is wrong with them
        values["data.on_bad_sample"] = "skip"
        reasons["data.on_bad_sample"] = f"{measured.left_out} of {read} cannot be used; `qmixlora data` lists them"
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
    most = _most(measured)
    busy = [count for count in most if count * measured.mean >= FULL or count == most[0]]
    sizes = [*((False, count) for count in busy), *((True, count) for count in most)]
    return [Edit({"train.checkpointing.enabled": again, "train.micro_batch_size": count}) for again, count in sizes]


def _most(measured: Measured) -> list[int]:
    """The samples at a time that are tried, most first: of small data no more than an eighth."""
    return [count for count in BATCHES if count <= max(1, measured.samples // 8)]


def _by_tokens(recipe: Recipe, measured: Measured) -> Edit:
    """Micro-batches by tokens, as large as those by samples, where much of these is padding."""
    count = recipe.train.micro_batch_size
    if count == 1 or padding_of(measured.lengths, recipe.train).shuffled < PADDED:
        return Edit({})
    return Edit({"train.batch_tokens": count * recipe.data.max_length, "train.micro_batch_size": 1})


def _with_levers(
    recipe: Recipe, card: int, planned: Callable[[Recipe], Plan | None], prefer: Preference, reasons: dict[str, str]
) -> tuple[Recipe, Plan]:
    """The recipe with the smallest set of levers with which it fits, or with one after the other until it does; those
    that change nothing of what is learned first, and where quality is preferred, alone.

    Raises UserError where there is no such set.
    """
    advice = plan_with_advice(recipe, card=card)
    together = advice.smallest_that_learns_the_same or advice.smallest
    if together is not None and (together.learns_the_same or prefer != "quality"):
        reasons |= _needed(together.edit, learns_the_same=together.learns_the_same)
        return together.edit.apply(recipe), together.plan
    facts = Facts(int(config_of(recipe.model).get_text_config().num_hidden_layers), advice.plan.batch.image_tokens)
    levers = [lever for lever, _ in lever_edits(recipe, facts) if lever.learns_the_same or prefer != "quality"]
    for lever in sorted(levers, key=lambda lever: not lever.learns_the_same):
        edit = to_the_end(lever, recipe, facts)
        with suppress(UserError):  # an edit that does not go with those before it
            if (its := planned(edit.apply(recipe))) is not None:
                recipe = edit.apply(recipe)
                reasons |= _needed(edit, learns_the_same=lever.learns_the_same)
                if its.fits:
                    return recipe, its
    raise UserError(
        f"No set of levers was found with which a sample of {advice.plan.batch.tokens} tokens fits this card: without "
        f"any it takes {in_words(advice.plan.peak_with_loading)} of {in_words(card)}.",
        where=f"model.id: {recipe.model.id}",
        fix="Take a smaller model or a larger card, or set data.max_image_tokens or data.max_length"
        + (", or prefer speed: some levers may cost accuracy." if prefer == "quality" else "."),
    )


def _needed(edit: Edit, *, learns_the_same: bool) -> dict[str, str]:
    """The reasons for a lever's values."""
    cost = "what is learned stays the same" if learns_the_same else "may cost accuracy"
    return dict.fromkeys(edit.values, f"needed for this card; {cost}")


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


def _evaluation(recipe: Recipe, card: int, residual: int, reasons: dict[str, str]) -> Edit:
    """As many samples at a time in evaluation as fit, where those of the recipe do not."""
    try:
        its = plan_evaluation(recipe, card=card, residual=residual)
    except UserError:  # as `_planned`
        return Edit({})
    if its.fits:
        return Edit({})
    fewer = its.samples_that_fit
    reasons["train.eval_batch_size"] = (
        f"evaluation of {fewer} at a time fits this card, of {its.samples} it does not"
        if fewer
        else "evaluation does not fit this card, not even one sample at a time; `qmixlora plan` says what it takes"
    )
    return Edit({"train.eval_batch_size": fewer or 1})


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
    sizes = {card_bytes(name): size for name, size in CARDS.items()}
    larger = min((own for own in sizes if own > card), default=None)
    return (0, 0) if larger is None else (room_on(larger), sizes[larger])
