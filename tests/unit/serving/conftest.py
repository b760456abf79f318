"""An export with a fingerprint, made once; tests that break it take a copy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmixlora.export import Request, export
from tests.families.run import train_variant
from tests.families.variants import qwen2_5_vl
from tests.unit.export.helpers import QUIET

SERVER = Path(__file__).with_name("server.py")


@pytest.fixture(scope="session")
def made_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`exports/` of a run of a tiny Qwen2.5-VL whose images are limited: `base`, `a-lora` and `a-merged`."""
    folder = tmp_path_factory.mktemp("served")
    run = train_variant(qwen2_5_vl.VARIANT, folder, QUIET, max_new_tokens=4)
    export(run, Request(tasks=("a",), forms=("lora", "merged")), QUIET)
    return run / "exports"


@pytest.fixture
def exports(made_exports: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(made_exports, tmp_path / "exports"))


@pytest.fixture(scope="session")
def server(made_exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of `base` with its adapter `a`, and with another one of twice its scale as `doubled`."""
    doubled = Path(shutil.copytree(made_exports / "a-lora", tmp_path_factory.mktemp("adapters") / "doubled"))
    config = json.loads((doubled / "adapter_config.json").read_text())
    (doubled / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    adapters = (f"a={made_exports / 'a-lora'}", f"doubled={doubled}")
    command = [sys.executable, str(SERVER), str(made_exports / "base"), *adapters]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "it did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.communicate()
