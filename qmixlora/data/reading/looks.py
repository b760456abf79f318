"""Looks at the images that rows name: each file's header once, those of many rows on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmixlora.data.formats import ImageFile
from qmixlora.data.images.files import locate
from qmixlora.data.images.opening import check_header
from qmixlora.errors import UserError
from qmixlora.parallel import in_chunks

REMEMBERED = 65_536  # files: data often asks several questions about one
MANY = 1000  # files that are worth other processes
CHUNK = 100  # files that a process looks at before it is given others
LONGEST = 4096  # characters of an image's name; what is longer holds the image itself


class ImageLooks:
    """Brings images under a root into the one form, with a readable header and not too many pixels; files lie `inside`
    one of some folders, where these are given. `links` are the names that lead elsewhere than they say, and where to.
    """

    def __init__(self, root: Path, max_pixels: int, inside: Sequence[Path] | None = None) -> None:
        self.root, self.max_pixels, self.inside = root, max_pixels, inside
        self.links: dict[str, str] = {}
        self._plainly = str(root.resolve())
        self._known: dict[str, ImageFile] = {}

    def look_ahead(self, images: Iterable[Any]) -> None:
        """Look at those of the images that are files, on all cores where they are many."""
        names = list({image: None for image in images if _is_name(image) and image not in self._known})
        if len(self._known) + len(names) > REMEMBERED:
            self._known.clear()
        if len(names) < MANY:
            return
        parts = in_chunks(lambda chunk: [self._looked_at(names[index]) for index in chunk], len(names), CHUNK)
        files = (file for part in parts for file in part)
        self._known.update((name, file) for name, file in zip(names, files, strict=True) if file is not None)

    def located(self, image: Any, origin: str) -> ImageFile:
        """An image of a row, which is named in errors. Raises UserError as `locate` and `check_header`."""
        if not _is_name(image):
            return self._located(image, origin)
        file = self._known.get(image) or self._located(image, origin)
        if file["bytes"] is None:  # what is in the row itself says so by the row's name
            self._known[image] = file
            if file["path"] not in (image, f"{self._plainly}{os.sep}{image}"):
                self.links[image] = str(file["path"])
        return file

    def _looked_at(self, name: str) -> ImageFile | None:
        """A file; None where there is none, or something wrong with it, which `located` says with the row."""
        try:
            file = self._located(name, "")
        except UserError:
            return None
        return file if file["bytes"] is None else None

    def _located(self, image: Any, origin: str) -> ImageFile:
        file = locate(image, self.root, origin, self.inside)
        check_header(file, self.max_pixels, named_by="" if file["bytes"] else origin)
        return file


def lead_there(links: Mapping[str, str], root: Path) -> bool:
    """Whether names under a root still lead to the files that they led to."""
    try:
        return all(locate(name, root, "")["path"] == path for name, path in links.items())
    except UserError:
        return False


def size_of(image: Any) -> int:
    """The bytes of an image that is in the row itself."""
    if isinstance(image, Mapping):
        return len(image.get("bytes") or b"")
    return len(image) if isinstance(image, str) and not _is_name(image) else 0


def _is_name(image: Any) -> bool:
    return isinstance(image, str) and len(image) <= LONGEST
