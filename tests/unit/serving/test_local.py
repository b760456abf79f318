"""Exports asked in this process: in folders of any name, and with files that are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmixlora.serving.check import check
from qmixlora.serving.fingerprint import FINGERPRINT, read_fingerprint
from qmixlora.serving.local import with_peft
from qmixlora.serving.stock import put_adapter
from tests.conftest import CommandLine


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
