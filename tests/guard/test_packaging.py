"""What is in the checkout is in the package that pip installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_folder_of_the_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {listed["package-dir"].get(name, name.replace(".", "/")) for name in listed["packages"]}
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "qmixlora").rglob("__init__.py")}
    assert installed == folders | {"cli", "recipes"}
