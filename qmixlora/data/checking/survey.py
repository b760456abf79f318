"""A survey of a data set: the lengths of its samples and the tokens of its images, without a model.

Image sizes are read from the files' headers; samples that are long by their characters and images are tokenised.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import quantiles

from datasets import Dataset

from qmixlora.data.rendering.collate import Collator
from qmixlora.data.rendering.lengths import Lengths
from qmixlora.data.splits.tasks import indices_by_answer

SAMPLED = 1000  # samples whose length is worked out for the median and the 99th percentile
CANDIDATES = 256  # samples that may be the longest, by their characters and image sizes
CHARACTERS = 4  # in a token, for that estimate


@dataclass(frozen=True)
class Survey:
    """The indices of a data set's longest samples and of those with the largest images, each from the most to the
    least (at most `CANDIDATES`); and its sizes in tokens.
    """

    longest: list[int]
    largest_images: list[int]
    samples: int
    tasks: int
    median: float
    p99: float
    most_tokens: int
    most_image_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.samples} samples; tokens: median {self.median:.0f}, p99 {self.p99:.0f}, largest "
            f"{self.most_tokens}; image tokens: largest {self.most_image_tokens}"
        )


def survey(rows: Dataset, collator: Collator) -> Survey:
    """Survey rows as the collator will tokenise them (its processor's image limits included)."""
    length_of = Lengths(collator)
    image_tokens = [length_of.of_images(row) for row in rows]
    characters = [sum(len(turn["text"]) for turn in row["turns"]) for row in rows]

    def estimate(index: int) -> int:
        return image_tokens[index] + characters[index] // CHARACTERS

    def length(index: int) -> int:
        return length_of(rows[index], image_tokens[index])

    everything = range(len(rows))
    candidates = {index: length(index) for index in sorted(everything, key=estimate, reverse=True)[:CANDIDATES]}
    # drawn, since every so-manieth row may be of one task
    lengths = [length(index) for index in random.Random(0).sample(everything, min(SAMPLED, len(rows)))]
    cuts = quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
    largest = sorted(everything, key=lambda index: (image_tokens[index], candidates.get(index, 0)), reverse=True)
    return Survey(
        longest=sorted(candidates, key=lambda index: candidates[index], reverse=True),
        largest_images=largest[:CANDIDATES],
        samples=len(rows),
        tasks=len(indices_by_answer(rows)),
        median=cuts[49],
        p99=cuts[98],
        most_tokens=max(candidates.values()),
        most_image_tokens=max(image_tokens),
    )
