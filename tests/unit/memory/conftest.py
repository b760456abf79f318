"""A backbone whose activations show beside the allocator's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backbones import save_llava


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A LLaVA whose activations are megabytes: blocks of 512 bytes do not show."""
    return save_llava(tmp_path_factory.mktemp("wide"), processor, layers=4, width=256)
