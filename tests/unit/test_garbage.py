"""Work without a search for garbage, and what is left of that behind it."""

from __future__ import annotations

import gc

import pytest

from qmixlora.garbage import without_garbage_collection


def test_garbage_is_collected_again_after_work_without_it() -> None:
    with pytest.raises(ValueError), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
