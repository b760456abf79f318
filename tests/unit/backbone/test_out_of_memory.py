"""Memory that runs out is seen, also inside transformers' loader, which catches every exception; what goes on without
it; and the room that is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qmixlora import session
from qmixlora.backbone import loading
from qmixlora.inspection.damage import measure_nf4
from qmixlora.out_of_memory import unless_out_of_memory
from qmixlora.recipe import Model, Recipe
from qmixlora.serving import stock
from qmixlora.session import Session, open_model, open_session, with_whole_model


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


class Full:
    """A card that is full: loading runs out of memory on it, or work does. `places` are those that models went to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, for_models: bool) -> None:
        self.places: list[dict[str, Any]] = []
        load = session.load_backbone

        def load_backbone(spec: Model, **place: Any) -> Any:
            self.places.append(place)
            if for_models and place["device"] is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return load(spec, **place)

        monkeypatch.setattr(session, "load_backbone", load_backbone)

    def use(self, opened: Session) -> torch.device:
        if self.places[-1]["device"] is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return opened.device


@pytest.mark.parametrize("for_models", [True, False])
def test_what_needs_all_weights_goes_to_the_cpu_where_a_card_is_full(
    for_models: bool, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Full(monkeypatch, for_models=for_models)
    assert with_whole_model(make_recipe(), card.use) == torch.device("cpu")
    assert card.places == [{"device": None}, {"device": torch.device("cpu")}], "none of its weights is offloaded"


def test_what_nf4_does_is_measured_where_a_card_does_not_hold_the_model(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    expected = measure_nf4(recipe.model, recipe.data.train, 2)
    card = Full(monkeypatch, for_models=True)
    assert measure_nf4(recipe.model, recipe.data.train, 2) == expected and len(card.places) == 2


def test_room_is_made_before_a_model_is_loaded(
    make_recipe: Callable[..., Recipe], backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    loads = {loading: lambda: open_model(make_recipe()), stock: lambda: stock.load_model(backbone)}
    for module, load in loads.items():
        monkeypatch.setattr(module, "make_room", lambda: made.append("room"))
        kind = module.AutoModelForImageTextToText
        read = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, read=read, **k: made.append("model") or read(*a, **k))
        load()
        assert made[:2] == ["room", "model"]
        made.clear()
