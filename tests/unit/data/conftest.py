"""An image file beside the data files of a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path: Path) -> str:
    """The name of a small PNG in the test's folder."""
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "p.png")
    return "p.png"
