"""What a row gives as an image, brought into one form: a path, or a file's bytes.

Understood: paths, `file://` addresses, data URIs, base64, bytes, and the `{"path", "bytes"}` of `datasets.Image`.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from urllib.request import url2pathname

from qmixlora.data.formats import ImageFile
from qmixlora.errors import UserError

from .opening import image_size, shown

DATA_URI = re.compile(r"\s*data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(;[^;,]*)*),", re.IGNORECASE)
FILE_URI = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters at least: C:// is a drive
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")  # no file format has a shorter header
NAMES = ("path", "url", "image_url")  # keys of a mapping that name an image


def locate(image: Any, root: Path, origin: str, inside: Sequence[Path] | None = None) -> ImageFile:
    """An image of a row in the one form; `path` of bytes says in words where they come from.

    `root` is the folder that relative paths start from, `origin` the row, for messages. A file has to lie in one of the
    folders `inside`, which are resolved (None: anywhere). It is known to exist; its content is not looked at (except of
    text that may be base64).

    Raises:
        UserError: it is none of what is understood, an address on the web (never fetched), a file elsewhere (by `..`, a
            link, or a path from the root), or there is no such file.
    """
    if isinstance(image, Mapping):
        return _from_mapping(image, root, origin, inside)
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_bytes(bytes(image), "bytes", origin)
    if isinstance(image, Path | str):
        return _from_text(str(image), root, origin, inside)
    kind = "null" if image is None else f"of type {type(image).__name__}"
    raise UserError(f"An image is {kind}.", where=origin, fix="Give a path, a data URI, or path and bytes.")


def _from_mapping(image: Mapping[str, Any], root: Path, origin: str, inside: Sequence[Path] | None) -> ImageFile:
    name = next((image[key] for key in NAMES if image.get(key) is not None), None)
    if (content := image.get("bytes")) is not None:
        if not isinstance(content, bytes | bytearray | memoryview):
            raise UserError(f"An image's 'bytes' are of type {type(content).__name__}.", where=origin)
        return _from_bytes(bytes(content), shown(name or "bytes"), origin)
    if name is None:
        raise UserError(
            f"An image has neither a path nor bytes; its keys are {sorted(map(str, image))}.",
            where=origin,
            fix=f"Name it by one of {', '.join(NAMES)}, or give its bytes.",
        )
    return locate(name, root, origin, inside)


def _from_bytes(content: bytes, name: str, origin: str) -> ImageFile:
    if not content:
        raise UserError("An image is empty (0 bytes).", where=f"{name} (named by {origin})")
    return {"path": f"{origin}, {name}", "bytes": content}


def _from_text(text: str, root: Path, origin: str, inside: Sequence[Path] | None) -> ImageFile:
    if uri := DATA_URI.match(text):
        return _from_bytes(_embedded(text[uri.end() :], uri, origin), "data URI", origin)
    names = [text]
    if uri := FILE_URI.match(text):
        rest = text[uri.end() :]
        names = [rest, url2pathname(rest)]  # as it stands, for those who do not escape names; as the standard has it
    elif SCHEME.match(text):
        raise UserError(
            "An image is an address on the web; these are not fetched.",
            where=f"{shown(text)} (named by {origin})",
            fix="Download the images first, and name the files in the data.",
        )
    problems = [_problem(root / name) if name else "has an empty path" for name in names]
    for name, problem in zip(names, problems, strict=True):
        if problem is None:
            file = (root / name).resolve()
            _check_inside(file, root / name, origin, inside)
            return {"path": str(file), "bytes": None}
    content = _from_base64(text)
    if content is not None and _is_image(content):
        return _from_bytes(content, "base64", origin)
    raise UserError(
        f"An image {problems[-1]}.",
        where=f"{shown(root / names[-1])} (named by {origin})",
        fix="Correct the path, or the folder that it starts from, data.image_root.",
    )


def _check_inside(file: Path, named: Path, origin: str, inside: Sequence[Path] | None) -> None:
    """Raise UserError for a file in none of the folders (None: all are)."""
    if inside is None or any(file.is_relative_to(folder) for folder in inside):
        return
    link = f", a link to {shown(file)}" if file != named.absolute() and ".." not in named.parts else ""
    raise UserError(
        f"An image lies outside of {shown(inside[0])}; set data.image_root to a folder that holds all images, or "
        "data.allow_outside: true.",
        where=f"{shown(named)}{link} (named by {origin})",
        fix="Data that may name any file of this machine is to be trusted: look at it first.",
    )


def _problem(path: Path) -> str | None:
    """Why a path cannot be read, to complete "An image ..."; None if it can."""
    try:
        found = path.stat()
        str(path.resolve()).encode()  # Arrow, which holds the rows, has no other names
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "has a path that no file can have"
    if stat.S_ISDIR(found.st_mode):
        return "is a folder"
    if not stat.S_ISREG(found.st_mode):
        return "is no ordinary file"
    return None if found.st_size else "is empty (0 bytes)"


def _embedded(payload: str, uri: re.Match[str], origin: str) -> bytes:
    """What a data URI holds. Raises UserError for another kind of file, or for what is no base64."""
    kind = (uri["type"] or "image/").lower()
    if not kind.startswith(("image/", "application/octet-stream")):
        raise UserError(f"An image is a data URI of type {kind}.", where=origin, fix="Give an image/... one.")
    if ";base64" not in uri["parameters"].lower():
        return unquote_to_bytes(payload)
    content = _from_base64(unquote(payload), strict=False)
    if content is None:
        raise UserError("An image is a data URI whose base64 is broken.", where=f"{shown(uri[0])}... in {origin}")
    return content


def _from_base64(text: str, *, strict: bool = True) -> bytes | None:
    """Bytes of base64, of either alphabet and with or without padding. `strict`: None for all that is short."""
    letters = "".join(text.split())
    if strict and not BASE64.fullmatch(letters):
        return None
    letters = letters.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _is_image(content: bytes) -> bool:
    try:
        image_size({"path": None, "bytes": content})
    except UserError:
        return False
    return True
