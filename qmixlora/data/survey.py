"""A survey of a data set: the lengths of its samples and the tokens of its images, without a model.

Image sizes are read from the files' headers; samples that are long by their characters and images are tokenised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import quantiles

from datasets import Dataset

from .collate import Collator
from .formats import IMAGE, question_about
from .images import blank_image, image_size

SAMPLED = 1000  # samples whose length is worked out for the median and the 99th percentile
CANDIDATES = 256  # samples that may be the longest, by their characters and image sizes
CHARACTERS = 4  # in a token, for that estimate
SQUARE = (224, 224)


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
    tokens_of = _image_tokens(collator)
    image_tokens = [sum(tokens_of(image_size(image)) for image in row["images"]) for row in rows]
    characters = [sum(len(turn["text"]) for turn in row["turns"]) for row in rows]

    def estimate(index: int) -> int:
        return image_tokens[index] + characters[index] // CHARACTERS

    def length(index: int) -> int:
        turns = rows[index]["turns"]
        marks: int = sum(turn["text"].count(IMAGE) for turn in turns)
        return len(collator.tokens(turns)) - marks + image_tokens[index]

    everything = range(len(rows))
    candidates = {index: length(index) for index in sorted(everything, key=estimate, reverse=True)[:CANDIDATES]}
    lengths = [length(index) for index in range(0, len(rows), max(1, len(rows) // SAMPLED))]
    cuts = quantiles(lengths, n=100) if len(lengths) > 1 else lengths * 99
    largest = sorted(everything, key=lambda index: (image_tokens[index], candidates.get(index, 0)), reverse=True)
    return Survey(
        longest=sorted(candidates, key=lambda index: candidates[index], reverse=True),
        largest_images=largest[:CANDIDATES],
        samples=len(rows),
        tasks=len(set(rows["task"])),
        median=cuts[49],
        p99=cuts[98],
        most_tokens=max(candidates.values()),
        most_image_tokens=max(image_tokens),
    )


def _image_tokens(collator: Collator) -> Callable[[tuple[int, int]], int]:
    """A function that gives the tokens of an image by its (width, height), the marks that the processor puts around it
    included; every size is worked out once.

    Many processors count tokens without processing an image, some of them without the marks. These are as many for
    every image: one processed image shows them. Other processors process a blank image of every size.
    """

    def processed(size: tuple[int, int]) -> int:
        row = question_about([blank_image(size)], "")
        with_mark = len(collator.tokens(row["turns"][:-1], prompt=True))
        return int(collator.prompts([row])["input_ids"].shape[1]) - (with_mark - 1)

    count = getattr(collator.processor, "_get_num_multimodal_tokens", None)  # what vLLM asks processors
    if count is None:
        return cache(processed)

    def counted(size: tuple[int, int]) -> int:
        width, height = size
        return int(count(image_sizes=[[height, width]])["num_image_tokens"][0])

    marks = processed(SQUARE) - counted(SQUARE)
    return cache(lambda size: counted(size) + marks)
