"""A card that is too small when a test says so."""

from __future__ import annotations

import pytest

from .card import Card


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)
