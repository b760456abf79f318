"""The real backbone at toy size: a random language model and tower, two steps of each part of the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.demo.real import backbone
from tests.standin import small_language_model


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORD_BATCH", "CAPTION_BATCH"):
        monkeypatch.setattr(backbone, name, 2)
    for name in ("WORD_STEPS", "CAPTION_STEPS"):
        monkeypatch.setattr(backbone, name, 4)


@pytest.fixture
def make(few_steps: None) -> Callable[..., Path]:
    """Make a real backbone of the stand-in in a folder."""
    from qmixlora.demo.real.backbone import make_real_backbone

    def made(folder: Path, on_progress: Any = lambda done, total: None) -> Path:
        return make_real_backbone(folder, on_progress, read=small_language_model)

    return made
