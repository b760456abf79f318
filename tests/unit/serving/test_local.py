"""Exports asked here: in folders of any name, with files that are damaged, on the very model of their run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qmixlora.errors import UserError
from qmixlora.serving import local
from qmixlora.serving.check import check
from qmixlora.serving.fingerprint import FINGERPRINT, read_fingerprint
from qmixlora.serving.local import with_peft
from qmixlora.serving.stock import put_adapter
from tests.conftest import CommandLine

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


@pytest.mark.parametrize("name", ["training", "keys", "a.b", "."])
def test_an_adapters_folder_may_have_any_name(exports: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """PEFT makes modules of its own names for adapters, which must be none that a module has."""
    folder = Path(shutil.copytree(exports / "a-lora", exports / name) if name != "." else exports / "a-lora")
    monkeypatch.chdir(folder)
    fingerprint = read_fingerprint(folder)
    asked = with_peft(Path(name) if name == "." else folder, fingerprint, None)
    assert check(fingerprint, asked).verdict == "applied"
    put_adapter(asked.stock, exports / "a-lora")  # in place of it
    put_adapter(asked.stock, folder)
    assert check(fingerprint, asked).verdict == "applied" and len(asked.stock.model.peft_config) == 1


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("a-lora/adapter_model.safetensors", "PEFT cannot load the adapter"),
        ("a-lora/adapter_config.json", "cannot be read"),
        ("base/model.safetensors", "transformers cannot load the model"),
        ("base/config.json", "transformers cannot load the model"),
    ],
)
def test_a_file_that_is_cut_is_told(qmixlora: CommandLine, exports: Path, file: str, told: str) -> None:
    whole = (exports / file).read_bytes()
    (exports / file).write_bytes(whole[: len(whole) // 2])
    done = qmixlora("check", exports / "a-lora", "--peft")
    assert done.code == 2 and told in done.stderr, done.stderr
    (exports / "a-lora" / FINGERPRINT).unlink()
    done = qmixlora("check", "--adapter", exports / "a-lora", "--base", exports / "base")
    assert done.code == 2 and "does not load on this base" in done.stderr, done.stderr
