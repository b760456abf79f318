"""The rows that a model can be taught: all looked at before the first step, so that none ends a run in its middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from datasets import Dataset

from qmixlora.data.reading.loading import Loaded
from qmixlora.data.reading.store import records
from qmixlora.data.refusals import Refusals
from qmixlora.data.rendering.answers import one_answer_each
from qmixlora.data.rendering.collate import Collator
from qmixlora.data.rendering.dates import date_problem
from qmixlora.data.rendering.lengths import Lengths
from qmixlora.data.rendering.rendering import rendering_problem
from qmixlora.data.splits.loading import Splits, read_splits, source_of
from qmixlora.recipe import Data, Train

from .answer_lengths import too_long_to_generate
from .facts import DataFacts, answers_by_task, facts_of, warnings_of
from .special_tokens import learned_as_letters
from .verdicts import Verdict, verdict_on

RENDERED = 100  # rows of each split whose answers are looked for in what the chat template makes of them


@dataclass(frozen=True)
class Checked:
    """Some splits of a recipe's data, every row of which has been looked at."""

    data: Data
    collator: Collator
    loaded: Mapping[str, Loaded]
    verdicts: Mapping[str, Verdict]  # on what was loaded, and what was refused before
    read_in: Splits  # as it was read
    rewritten: Sequence[str] = ()  # what the chat template makes otherwise of conversations, by split

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """The rows that fit, of every split."""
        return {
            split: one.rows
            if len(self.verdicts[split].kept) == len(one.rows)
            else one.rows.select(self.verdicts[split].kept)
            for split, one in self.loaded.items()
        }

    @property
    def refused(self) -> Refusals:
        """What does not fit, of all splits."""
        return Refusals.of_all(verdict.refusals for verdict in self.verdicts.values())

    def facts(self, spec: Train) -> DataFacts:
        """What the splits hold; `spec` says how batches are made of them, and how long an answer may be."""
        answers = {split: answers_by_task(rows) for split, rows in self.rows.items()}
        splits = [
            facts_of(split, self.loaded[split], self.verdicts[split], answers[split], spec) for split in self.loaded
        ]
        asked = [split for split in answers if split != "train"] or ["train"]
        cut = {
            split: too_long_to_generate(answers[split].values(), self.collator, spec.max_new_tokens) for split in asked
        }
        spelled = {split: learned_as_letters(own.values(), self.collator.template) for split, own in answers.items()}
        over = {split: verdict.told_of_images(self.data.max_image_tokens) for split, verdict in self.verdicts.items()}
        told = [f"data.{split}: {what}" for split, one in self.loaded.items() for what in one.refused.doubts]
        told += [f"data.{split}: {what}" for texts in (over, cut, spelled) for split, what in texts.items() if what]
        return DataFacts(splits, [*self.rewritten, *warnings_of(self.data, self.rows, answers), *told])


def checked(data: Data, collator: Collator, splits: Sequence[str]) -> Checked:
    """Look at every row of some splits as a model is taught them whose batches the collator makes.

    That is one answer each where its chat template asks for that (`one_answer_each`). Raises UserError as
    `read_splits`.
    """
    loaded, verdicts, rewritten = dict[str, Loaded](), dict[str, Verdict](), list[str]()
    read_in, dated = read_splits(data, splits), date_problem(collator.template)
    length = Lengths(collator)
    for split, one in read_in.loaded.items():
        rows = one_answer_each(one.rows, collator.template)
        verdict = verdict_on(rows, length, data)
        refused = Refusals.of_all([one.refused, verdict.refusals])
        read = one.read + len(rows) - len(one.rows)
        loaded[split], verdicts[split] = Loaded(rows, one.refused, read), replace(verdict, refusals=refused)
        first = rows.select(verdict.kept[:RENDERED])
        told = ((rendering_problem(collator, row), dated(row)) for row in records(first))
        problems = Counter(why for both in told for why in both if why)
        rewritten += [f"data.{split}: {n} of the first {len(first)} samples: {why}" for why, n in problems.items()]
    return Checked(data, collator, loaded, verdicts, read_in, rewritten)


def taught(data: Data, collator: Collator, splits: Sequence[str]) -> Checked:
    """`checked`, of which nothing is left out unless the recipe says so: with `data.on_bad_sample: skip` it is said on
    stderr what does not fit.

    Raises:
        UserError: as `checked`; or rows do not fit, as `Refusals` lists them.
    """
    found = checked(data, collator, splits)
    empty = next((split for split, rows in found.rows.items() if not len(rows)), None)
    if empty is not None:
        raise found.verdicts[empty].refusals.error(source_of(data, empty), any_left=False)
    if found.refused.count and data.on_bad_sample == "stop":
        raise found.refused.error("data")
    for split, one in found.loaded.items():
        found.verdicts[split].refusals.say(source_of(data, split), one.read)
    return found
