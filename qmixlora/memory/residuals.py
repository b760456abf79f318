"""Residuals: the bytes that probes on this machine found missing in plans, kept beside the cached backbone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qmixlora.files import cache_folder, write_json


def residual_of(model: str) -> int:
    """Bytes that the last probe of this model on the GPU at hand found missing in its plan; 0 where there was none, or
    nothing was missing.
    """
    known = {device: models[model] for device, models in remembered().items() if model in models}
    if not known or not torch.cuda.is_available():  # asking for the name makes a CUDA context
        return 0
    return max(0, known.get(torch.cuda.get_device_name(0), 0))


def remember(device: str, model: str, residual: int) -> None:
    """Keep a residual (bytes; negative where the plan was above)."""
    known = remembered()
    known.setdefault(device, {})[model] = residual
    write_json(_file(), known)


def remembered() -> dict[str, dict[str, int]]:
    """Residuals by device and model, in bytes."""
    try:
        residuals: dict[str, dict[str, int]] = json.loads(_file().read_text(encoding="utf-8"))
        return residuals
    except (OSError, ValueError):
        return {}


def _file() -> Path:
    return cache_folder() / "probes.json"
