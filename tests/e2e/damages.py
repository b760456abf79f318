"""Damages of files, each as a disk, a copy or a hand does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

Damage = Callable[[Path], None]


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def zeroed_at_the_end(file: Path) -> None:
    """As after a power cut: the length is right, and the last blocks were never written."""
    whole = file.read_bytes()
    kept = len(whole) * 3 // 4
    file.write_bytes(whole[:kept] + bytes(len(whole) - kept))


def flipped(file: Path) -> None:
    """One bit is another one."""
    whole = bytearray(file.read_bytes())
    whole[len(whole) * 2 // 3] ^= 1
    file.write_bytes(whole)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def missing(file: Path) -> None:
    file.unlink()


DAMAGES: tuple[Damage, ...] = (truncated, zeroed, zeroed_at_the_end, flipped, emptied, missing)


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of twice the length."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
