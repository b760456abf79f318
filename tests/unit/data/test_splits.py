"""The splits that a recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.data import load_split
from qmixlora.errors import UserError
from qmixlora.recipe import Data


@pytest.fixture
def source(data: Path) -> Data:
    return Data(train=str(data / "train.json"), test=str(data / "test.json"))


def test_every_split_is_its_own_file(source: Data) -> None:
    assert len(load_split(source, "train")) > len(load_split(source, "test")) > 0


@pytest.mark.parametrize("split", ["validation", "image_root"])
def test_a_split_that_the_recipe_lacks_is_named_with_those_that_it_has(source: Data, split: str) -> None:
    with pytest.raises(UserError, match=f"no split '{split}'") as caught:
        load_split(source, split)
    assert "train, test" in str(caught.value.fix)
