"""What is in the checkout is in the package that pip installs, which asks for the releases that were tested."""

from __future__ import annotations

import pkgutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return parsed


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_folder_of_the_package_is_installed() -> None:
    listed = project()["tool"]["setuptools"]
    installed = {listed["package-dir"].get(name, name.replace(".", "/")) for name in listed["packages"]}
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "qmixlora").rglob("__init__.py")}
    assert installed == folders | {"cli", "recipes"}


def test_the_command_that_is_installed_is_there() -> None:
    (command,) = project()["project"]["scripts"].values()
    assert callable(pkgutil.resolve_name(command))


def bounded() -> list[Requirement]:
    """What users install, and the demo's: the rest is for tests."""
    wanted = project()["project"]
    return [Requirement(line) for line in (*wanted["dependencies"], *wanted["optional-dependencies"]["demo"])]


@pytest.mark.parametrize("wanted", bounded(), ids=lambda wanted: wanted.name)
def test_the_lower_bound_is_the_oldest_release_that_is_tested(wanted: Requirement) -> None:
    (bound,) = wanted.specifier
    name = canonicalize_name(wanted.name)
    assert bound.operator == ">=" and Version(bound.version) == pins("requirements-oldest.lock")[name]
    assert pins("requirements.lock")[name] in wanted.specifier
