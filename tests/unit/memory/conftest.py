"""A backbone whose activations show beside the allocator's blocks; a machine with a GPU, as far as torch tells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones import save_llava


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A LLaVA whose activations are megabytes: blocks of 512 bytes do not show."""
    return save_llava(tmp_path_factory.mktemp("wide"), processor, layers=4, width=256)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a GPU, and like CUDA refuses to be asked for its name in a forked process.

    Nothing can lie on it: these tests are about what is decided before anything does.
    """
    process = os.getpid()

    def name(device: int | None = None) -> str:
        if os.getpid() != process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
        return "NVIDIA GeForce RTX 4090"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
