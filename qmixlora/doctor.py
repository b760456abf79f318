"""The doctor: findings about this machine, with advice where something is lacking."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from typing import NamedTuple

import psutil
import torch

from .device import GIB, default_device, spills

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "peft", "datasets")


class Finding(NamedTuple):
    """One thing that was examined; `advice` says what to do where it is not `ok`."""

    what: str
    found: str
    ok: bool
    advice: str = ""


def examine() -> list[Finding]:
    """Examine Python, packages, GPU, NF4, memory and disk of this machine (sizes in GiB)."""
    findings = [Finding("python", sys.version.split()[0], sys.version_info >= (3, 11), "Use Python 3.11 or newer.")]
    findings += [_package(name) for name in PACKAGES]
    findings += [_gpu(), _nf4()]
    memory = psutil.virtual_memory().total / GIB
    findings.append(Finding("host memory", f"{memory:.1f} GiB", memory >= 4, "Loading a 7B model needs about 8 GiB."))
    free = shutil.disk_usage(".").free / GIB
    findings.append(Finding("free disk here", f"{free:.1f} GiB", free >= 5, "A 7B checkpoint takes about 15 GiB."))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, f"Install it: pip install {name}.")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none: everything runs on the CPU, which is fit for tiny models", True)
    properties, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    facts = [
        properties.name,
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        f"compute capability {properties.major}.{properties.minor}{_slow_bfloat16(properties.major)}",
        f"CUDA {torch.version.cuda}",
    ]
    if (count := torch.cuda.device_count()) > 1:
        facts.append(f"the first of {count}; `train --processes {count}` uses all of them")
    if spills():
        facts.append("the driver spills into host memory, so runs are held to the memory that is free at their start")
    return Finding("GPU", "; ".join(facts), True)


def _slow_bfloat16(major: int) -> str:
    """Before Ampere, bfloat16 is emulated, and attention holds a matrix that the planner does not count."""
    slow = "bfloat16 is slow here and its attention takes more memory than planned; set model.dtype: float16"
    return f" ({slow})" if major < 8 else ""


def _nf4() -> Finding:
    """Find out whether bitsandbytes really quantises and computes here."""
    advice = "Reinstall bitsandbytes for this platform; `python -m bitsandbytes` says more."
    try:
        from bitsandbytes.nn.modules import Linear4bit

        device = default_device()
        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
        finite = bool(layer(torch.ones(1, 64, device=device)).isfinite().all())
    except Exception as error:  # whatever the library, the driver or the loader raises is the finding
        return Finding("NF4 (bitsandbytes)", f"{type(error).__name__}: {error}", False, advice)
    return Finding("NF4 (bitsandbytes)", "works", finite, advice)
