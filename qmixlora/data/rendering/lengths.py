"""How many tokens a row will have, without an image being decoded or processed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TypeVar

from datasets import Dataset

from qmixlora.data.formats import Conversation, ImageFile, question_about, to_messages
from qmixlora.data.images.opening import blank_image, image_size
from qmixlora.parallel import in_chunks

from .collate import Collator

SQUARE = (224, 224)
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
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator
        self.size = by_path(image_size)
        self.of_image = cache(self._of_image)
        self._count = getattr(collator.processor, "_get_num_multimodal_tokens", None)  # what vLLM asks processors
        try:
            self._marks = self._processed(SQUARE) - self._counted(SQUARE) if self._count is not None else 0
        except (TypeError, AttributeError):  # it expects another image processor than the one that is there
            self._count, self._marks = None, 0

    def of_images(self, row: Conversation) -> int:
        """The tokens of a row's images; their files' headers are read."""
        tokens: list[int] = [self.of_image(self.size(image)) for image in row["images"]]
        return sum(tokens)

    def __call__(self, row: Conversation, image_tokens: int | None = None) -> int:
        """The tokens of a whole row. `image_tokens` are those of its images, where they are known.

        Raises UserError if the chat template cannot render the row.
        """
        parts = [part for message in to_messages(row["turns"]) for part in message["content"]]
        marks = len([part for part in parts if part["type"] == "image"])
        own = self.of_images(row) if image_tokens is None else image_tokens
        return len(self.collator.tokens(row["turns"])) - marks + own

    def _of_image(self, size: tuple[int, int]) -> int:
        """The tokens of an image by its (width, height), the marks that the processor puts around it included."""
        return self._processed(size) if self._count is None else self._counted(size) + self._marks

    def _counted(self, size: tuple[int, int]) -> int:
        assert self._count is not None
        width, height = size
        return int(self._count(image_sizes=[[height, width]])["num_image_tokens"][0])

    def _processed(self, size: tuple[int, int]) -> int:
        row = question_about([blank_image(size)], "")
        with_mark = len(self.collator.tokens(row["turns"][:-1], prompt=True))
        return int(self.collator.prompts([row])["input_ids"].shape[1]) - (with_mark - 1)
