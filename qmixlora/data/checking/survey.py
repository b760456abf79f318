"""The lengths of a data set's samples and the tokens of its images, without a model.

Samples that are long by their characters and images are tokenised. Shapes: R rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import quantiles

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from qmixlora.data.rendering.lengths import Lengths
from qmixlora.data.rendering.refusing import naming
from qmixlora.data.splits.tasks import indices_by_answer

SAMPLED = 1000  # samples whose length is worked out for the median and the 99th percentile
CANDIDATES = 256  # samples that may be the longest, by their characters and image sizes
CHARACTERS = 4  # in a token, for that estimate


@dataclass(frozen=True)
class Survey:
    """The indices of a data set's longest samples and of those with the largest images, each from the most to the
    least (at most `CANDIDATES`); and its sizes in tokens, with the lengths of some samples (at most `SAMPLED`).
    """

    longest: list[int]
    largest_images: list[int]
    samples: int
    tasks: int
    lengths: list[int]
    median: float
    p99: float
    most_tokens: int
    most_image_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.samples} samples; tokens: median {self.median:.0f}, p99 {self.p99:.0f}, largest "
            f"{self.most_tokens}; image tokens: largest {self.most_image_tokens}"
        )

    def in_tokens(self) -> dict[str, float]:
        """The lengths, by name."""
        return {
            "median": self.median,
            "p99": self.p99,
            "largest": self.most_tokens,
            "largest_of_images": self.most_image_tokens,
        }


def survey(
    rows: Dataset, length_of: Lengths, image_tokens_R: NDArray[np.int32], characters_R: NDArray[np.int32]
) -> Survey:
    """Survey rows of which the tokens of their images, and the characters of their turns are known. Raises UserError,
    which names the row, if the chat template refuses one for its words.
    """
    estimate_R = image_tokens_R + characters_R // CHARACTERS

    def length(index: int) -> int:
        row = rows[index]
        with naming(row):
            return length_of(row, int(image_tokens_R[index]))

    candidates = {index: length(index) for index in np.argsort(-estimate_R, kind="stable")[:CANDIDATES].tolist()}
    # drawn, since every so-manieth row may be of one task
    lengths = [length(index) for index in random.Random(0).sample(range(len(rows)), min(SAMPLED, len(rows)))]
    cuts = quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
    largest = sorted(
        range(len(rows)), key=lambda index: (image_tokens_R[index], candidates.get(index, 0)), reverse=True
    )
    return Survey(
        longest=sorted(candidates, key=lambda index: candidates[index], reverse=True),
        largest_images=largest[:CANDIDATES],
        samples=len(rows),
        tasks=len(indices_by_answer(rows)),
        lengths=lengths,
        median=cuts[49],
        p99=cuts[98],
        most_tokens=max(candidates.values()),
        most_image_tokens=int(image_tokens_R.max()),
    )
