"""Memory that runs out inside transformers' loader, which catches every exception, is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qmixlora.backbone import loading
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training.recovery import unless_out_of_memory


def runs_out_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the quantiser find no memory from this call on; returns the calls that were made."""
    quantize, calls = bnb.functional.quantize_4bit, list[int]()

    def quantize_4bit(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) >= call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return quantize(*arguments, **options)

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", quantize_4bit)
    return calls


def test_memory_that_runs_out_while_levers_place_weights_is_seen_at_once(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = runs_out_at(5, monkeypatch)
    recipe = make_recipe(model={"offload_embeddings": True})
    assert unless_out_of_memory(lambda: open_session(recipe, [])) is None
    assert len(calls) == 5


def test_memory_that_runs_out_in_transformers_own_quantiser_is_seen(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There only the allocator's count tells, which is pretended here."""
    calls = runs_out_at(5, monkeypatch)
    monkeypatch.setattr(loading, "_times_out_of_memory", lambda: len(calls) // 5)
    assert unless_out_of_memory(lambda: open_session(make_recipe(), [])) is None


def test_other_errors_of_the_loader_stay_what_they_are(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a kernel that is missing")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    with pytest.raises(RuntimeError):
        unless_out_of_memory(lambda: open_session(make_recipe(), []))
