"""How many tokens a row will have, without an image being decoded or processed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TypeVar

from datasets import Dataset

from qmixlora.data.formats import IMAGE, Conversation, ImageFile, Turn, to_messages
from qmixlora.data.images.opening import blank_image, image_size
from qmixlora.parallel import in_chunks

from .collate import Collator

SMALL, WIDE = (224, 224), (1024, 384)  # (width, height) of images that stand for others
# images one after the other, each with a word right behind it, and each amid words
AT_ONCE, SPACED, APART = FORMS = IMAGE, f"{IMAGE}a ", f"a {IMAGE} "
REMEMBERED = 65536  # files that are looked at once: data often asks several questions about one
CHUNK = 1000  # rows that a process looks at before it is given others
T = TypeVar("T")


def by_path(look: Callable[[ImageFile], T]) -> Callable[[ImageFile], T]:
    """The function, which looks once at an image that is a file of its own."""
    remembered = lru_cache(REMEMBERED)(lambda path: look({"path": path, "bytes": None}))
    return lambda image: look(image) if image["bytes"] else remembered(image["path"])


def lengths_of(rows: Dataset, collator: Collator) -> list[int]:
    """The length of every row in tokens, worked out on all cores. Raises UserError as `Lengths`."""
    return sizes_of(rows, collator)[0]


def sizes_of(rows: Dataset, collator: Collator) -> tuple[list[int], list[int]]:
    """(the length of every row in tokens, the tokens of its images among them), as `lengths_of`."""
    length = Lengths(collator)

    def sizes(index: int) -> tuple[int, int]:
        row = rows[index]
        images = length.of_images(row)
        return length(row, images), images

    parts = in_chunks(lambda chunk: [sizes(index) for index in chunk], len(rows), CHUNK)
    found = [one for part in parts for one in part]
    return [whole for whole, _ in found], [images for _, images in found]


class Lengths:
    """Lengths of rows in tokens, as a collator (its processor's image limits included) would make them.

    Many processors count tokens without processing an image, some of them without the marks around it. These are as
    many for every image: one processed image shows them. Other processors process a blank image of every size.

    A row has the tokens of its text and those of its images; but some processors make fewer of an image that is not
    alone (LLaVA-OneVision), or put marks or blanks beside a text of their own accord (Molmo2, Idefics2). Processed
    rows with so many images show it. Of such rows the processor is given the text itself, with small blank images, and
    of every size an image among small ones.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator
        self.size = by_path(image_size)
        self.of_image = cache(self._of_image)
        self._adds_up = cache(self._rows_add_up)
        self._of_small = cache(lambda count: self._beside_text(_asked(SPACED, [SMALL] * count)))
        self._grown = cache(self._grown_from_small)
        self._count = getattr(collator.processor, "_get_num_multimodal_tokens", None)  # what vLLM asks processors
        try:
            self._marks = self._beside_text(_asked(AT_ONCE, [SMALL])) - self._counted(SMALL) if self._count else 0
        except (TypeError, AttributeError):  # it expects another image processor than the one that is there
            self._count, self._marks = None, 0

    def of_images(self, row: Conversation) -> int:
        """The tokens of a row's images; their files' headers are read."""
        sizes, count = [self.size(image) for image in row["images"]], len(row["images"])
        if not sizes or self._adds_up(count):
            return sum(map(self.of_image, sizes))
        return self._of_small(count) + sum(self._grown(size, count) for size in sizes)

    def __call__(self, row: Conversation, image_tokens: int | None = None) -> int:
        """The tokens of a whole row. `image_tokens` are those of its images, where they are known.

        Raises UserError if the chat template cannot render the row.
        """
        own, count = self.of_images(row) if image_tokens is None else image_tokens, len(row["images"])
        if self._adds_up(count):
            return len(self.collator.tokens(row["turns"])) - _marks_in(row) + own
        small: Conversation = {**row, "images": [blank_image(SMALL)] * count}
        return len(self.collator.processed(small)) - (self._of_small(count) if count else 0) + own

    def over(self, size: tuple[int, int], budget: int) -> int:
        """The image tokens of an image by its (width, height), marks not among them, where they are over a budget; 0
        where they are not.
        """
        if (self.of_image(size) if self._count is None else self._counted(size)) <= budget:
            return 0
        brought = Counter(self.collator.processed(_asked(AT_ONCE, [size])))
        most = max((brought - Counter(self.collator.tokens(_asked(AT_ONCE, [])["turns"]))).values())
        return most if most > budget else 0

    def _of_image(self, size: tuple[int, int]) -> int:
        """The tokens of an image by its (width, height), the marks that the processor puts around it included."""
        return self._beside_text(_asked(AT_ONCE, [size])) if self._count is None else self._counted(size) + self._marks

    def _counted(self, size: tuple[int, int]) -> int:
        assert self._count is not None
        width, height = size
        return int(self._count(image_sizes=[[height, width]])["num_image_tokens"][0])

    def _rows_add_up(self, count: int) -> bool:
        """Whether rows with so many images have the tokens of their text and of each image, and no others."""
        sizes = ([WIDE, SMALL] * count)[:count]
        try:
            told = sum(map(self.of_image, sizes))
            return all(self._beside_text(_asked(form, sizes)) == told for form in FORMS)
        except Exception:  # each in its own way, where a processor takes no such row: its batch says so
            return True

    def _grown_from_small(self, size: tuple[int, int], count: int) -> int:
        """By how many tokens an image has more than a small one, with other images to make `count` of them."""
        return self._beside_text(_asked(SPACED, [size, *[SMALL] * (count - 1)])) - self._of_small(count)

    def _beside_text(self, row: Conversation) -> int:
        """The tokens of a row that are none of its text's."""
        return len(self.collator.processed(row)) - (len(self.collator.tokens(row["turns"])) - _marks_in(row))


def _asked(form: str, sizes: Sequence[tuple[int, int]]) -> Conversation:
    """A row of blank images of some sizes, `form` repeated for each of them."""
    turns: list[Turn] = [{"role": "user", "text": form * len(sizes) + "a"}, {"role": "assistant", "text": "a"}]
    return {"turns": turns, "images": [blank_image(size) for size in sizes], "task": ""}


def _marks_in(row: Conversation) -> int:
    """How many tokens of a row's text stand for an image each."""
    parts = [part for message in to_messages(row["turns"]) for part in message["content"]]
    return len([part for part in parts if part["type"] == "image"])
