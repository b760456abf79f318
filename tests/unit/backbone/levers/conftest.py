"""A backbone that is deep enough to stream, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.recipe import Recipe
from tests.backbones import save_llava


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A random LLaVA of five decoder layers."""
    return save_llava(tmp_path_factory.mktemp("deep"), processor, layers=5, width=64)


@pytest.fixture
def recipe_of(deep: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe with levers; `sections` are other changes."""

    def make(levers: dict[str, Any], **sections: Any) -> Recipe:
        return make_recipe(model={"id": str(deep), **levers}, **sections)

    return make
