"""A run's folder with a routing record by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.mixlora.routing_record import FILE

from .records import record_by_hand


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record_by_hand(["s", "t"]).save(tmp_path / FILE)
    return tmp_path
