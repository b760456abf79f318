"""Images are opened in one place, so that everybody sees the same ones."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("qmixlora", "cli") for path in (ROOT / folder).rglob("*.py")]


def modules_with(pattern: str) -> set[str]:
    found = (path for path in FILES if re.search(pattern, path.read_text(encoding="utf-8")))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_one_module_opens_images() -> None:
    assert modules_with(r"\bImage\.open\(|\bload_image\(|imread\(") == {"qmixlora/data/images/opening.py"}


def test_one_module_converts_images_and_turns_them() -> None:
    assert modules_with(r"\.convert\(\"|\.transpose\(TURNS|exif_transpose") == {"qmixlora/data/images/appearance.py"}


def test_one_module_has_a_limit_of_pixels_beside_the_recipe() -> None:
    assert modules_with(r"MAX_IMAGE_PIXELS") == {"qmixlora/data/images/opening.py"}
