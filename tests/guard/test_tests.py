"""The tests stay in the package's own order: small files, in folders of the floors' names."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS, UNIT, PACKAGE = ROOT / "tests", ROOT / "tests" / "unit", ROOT / "qmixlora"
FILES = sorted(path for path in TESTS.rglob("*.py") if "fixtures" not in path.parts)


def test_test_files_stay_under_300_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length >= 300}


def test_the_folders_of_unit_tests_are_floors_of_the_package() -> None:
    folders = {path.parent.relative_to(UNIT) for path in UNIT.rglob("test_*.py")}
    assert not [str(folder) for folder in folders if not (PACKAGE / folder / "__init__.py").is_file()]


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in FILES if path.name.startswith("test_")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_name_of_a_test_is_a_claim() -> None:
    """Fewer than three words name a subject, and claim nothing of it."""
    names = [name for path in FILES for name in re.findall(r"def test_(\w+)\(", path.read_text(encoding="utf-8"))]
    assert not [name for name in names if len(name.split("_")) < 3]
