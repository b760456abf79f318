"""What an adapter lies on, and how that is loaded: by its config, by the recipe beside it, by its own base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmixlora.bases import Source, source_below
from qmixlora.errors import UserError


def adapter_with(folder: Path, config: dict[str, Any] | None, model: dict[str, Any] | None) -> Path:
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if model is not None:
        (folder / "recipe.yaml").write_text(json.dumps({"model": model}))
    return folder


@pytest.mark.parametrize(
    ("config", "model", "source"),
    [
        ({"base_model_name_or_path": "a/b", "revision": "v2"}, None, Source("a/b", "v2")),
        ({"base_model_name_or_path": "a/b"}, {"id": "a/b", "revision": "v1"}, Source("a/b", "v1")),  # of older releases
        ({"base_model_name_or_path": "a/b", "revision": "v2"}, {"id": "a/b", "revision": "v1"}, Source("a/b", "v2")),
        (
            {"base_model_name_or_path": "a/b"},
            {"id": "a/b", "trust_remote_code": True},
            Source("a/b", trust_remote_code=True),
        ),
        (
            {"base_model_name_or_path": "a/b"},
            {"id": "c/d", "revision": "v1", "trust_remote_code": True},
            Source("a/b"),  # what the recipe says is of another model
        ),
        (None, {"id": "a/b", "revision": "v1"}, Source("a/b", "v1")),  # a file of llama.cpp
        ({"base_model_name_or_path": "a/b"}, None, Source("a/b")),
    ],
)
def test_a_source_is_what_the_config_and_the_recipe_say(
    tmp_path: Path, config: dict[str, Any] | None, model: dict[str, Any] | None, source: Source
) -> None:
    assert source_below(adapter_with(tmp_path, config, model)) == source


def test_a_base_of_its_own_has_no_revision_and_the_code_that_the_recipe_allows(tmp_path: Path) -> None:
    adapter, base = tmp_path / "a-lora", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
        (folder / "base.json").write_text('{"projector": "one"}')
    config, model = {"base_model_name_or_path": str(base)}, {"id": "a/b", "revision": "v1", "trust_remote_code": True}
    assert source_below(adapter_with(adapter, config, model)) == Source(str(base), None, True)


@pytest.mark.parametrize("config", [None, {"base_model_name_or_path": None}])
def test_an_adapter_that_says_nothing_is_refused(tmp_path: Path, config: dict[str, Any] | None) -> None:
    with pytest.raises(UserError, match="Nothing says what"):
        source_below(adapter_with(tmp_path, config, None))


def test_a_recipe_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read"):
        source_below(tmp_path)


def test_a_folder_is_typed_as_it_is_and_a_model_of_the_hub_fetched(tmp_path: Path) -> None:
    (tmp_path / "my base").mkdir()
    assert Source("my base").folder_in_shell(tmp_path) == "'my base'"
    assert 'snapshot_download("a/b", revision="v2")' in Source("a/b", "v2").folder_in_shell(tmp_path)
    assert 'snapshot_download("a/b")' in Source("a/b").folder_in_shell(tmp_path)
