"""An export asked in this process is on the very model that its run had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmixlora.errors import UserError
from qmixlora.serving import local
from qmixlora.serving.fingerprint import read_fingerprint

from .written import on_the_model_as_it_is


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What is asked for of the hub, which is not there."""
    asked: list[tuple[Any, Any]] = []

    def load_model(model: str, _: str, **settings: Any) -> None:
        asked.append((model, {name: settings[name] for name in ("revision", "trust_remote_code")}))
        raise OSError("not there")

    monkeypatch.setattr(local, "load_model", load_model)
    return asked


def test_an_adapter_is_put_on_the_revision_and_the_code_that_the_run_had(
    exports: Path, loaded: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    export, fingerprint = exports / "a-lora", read_fingerprint(exports / "a-lora")
    on_the_model_as_it_is(export, "own/model", revision="v2", trust_remote_code=True)
    with pytest.raises(UserError, match="transformers cannot load") as refused:
        local.with_peft(export, fingerprint, None)
    assert "own/model at v2" in refused.value.where
    assert "Python code of own/model at v2 may run" in capsys.readouterr().err
    with pytest.raises(UserError):
        local.with_peft(export, fingerprint, "another/model")
    assert loaded == [
        ("own/model", {"revision": "v2", "trust_remote_code": True}),
        ("another/model", {"revision": None, "trust_remote_code": False}),
    ]


def test_a_merged_checkpoint_runs_the_code_that_the_run_ran(exports: Path, loaded: list[tuple[Any, Any]]) -> None:
    export = exports / "a-merged"
    recipe = export / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    with pytest.raises(UserError):
        local.with_transformers(export, read_fingerprint(export))
    assert loaded == [(str(export), {"revision": None, "trust_remote_code": True})]
