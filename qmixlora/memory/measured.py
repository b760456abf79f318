"""What a recipe is made for: the samples of its training data, measured by the model's processor, or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from qmixlora.data import answers_by_task, checked, generated_lengths, load_split
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import open_collator

from .architectures import config_of
from .simulation.batch import synthetic_batch

ANY_LENGTH = 2**17  # tokens: nothing is too long to be surveyed
BUDGET = 1024  # tokens of an image that is not measured, at most
CHARACTERS, FRAME = 3, 64  # in a token, and tokens of the template and a system prompt, where nothing is measured


@dataclass(frozen=True)
class Measured:
    """What is known of the data: its samples, their tasks, and those that cannot be used; lengths in tokens of some
    samples, the longest, the most of a sample's images, and of an answer with its end. `estimated`: no processor is
    here to measure them.
    """

    samples: int
    tasks: int
    left_out: int
    lengths: Sequence[int]
    longest: int
    image_tokens: int
    longest_answer: int
    estimated: bool = False
    budget: int | None = None  # that images have to be held to for that estimate
    doubts: Sequence[str] = ()  # what is likely a mistake in the samples that can be used

    @property
    def mean(self) -> float:
        """The mean length in tokens."""
        return sum(self.lengths) / len(self.lengths)


def measure(recipe: Recipe) -> Measured:
    """Look at the training data. Raises UserError if it cannot be read, or holds nothing."""
    whole = recipe.data.model_copy(update={"max_length": ANY_LENGTH, "on_bad_sample": "skip", "validation": None})
    try:
        collator = open_collator(recipe)
    except (UserError, OSError, ValueError, ImportError):
        return _estimated(recipe, load_split(whole, "train"))
    looked_at = checked(whole, collator, ["train"])
    found = looked_at.verdicts["train"]
    if found.survey is None:
        raise found.refusals.error(str(recipe.data.train), any_left=False)
    facts = found.survey
    answers = answers_by_task(looked_at.rows["train"]).values()
    longest_answer = max(generated_lengths({text for own in answers for text in own}, collator).values())
    sizes = facts.lengths, facts.most_tokens, facts.most_image_tokens, longest_answer
    doubts = looked_at.loaded["train"].refused.doubts
    return Measured(facts.samples, facts.tasks, found.refusals.count, *sizes, doubts=doubts)


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
    tasks, answer = len(set(rows["task"])), max(len(turns[-1]["text"]) for turns in rows["turns"]) // CHARACTERS + 1
    return Measured(len(rows), tasks, 0, lengths, max(lengths), max(images), answer, estimated=True, budget=budget)
