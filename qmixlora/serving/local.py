"""An export asked in this process, as stock transformers or PEFT loads it: its folder as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from qmixlora.bases import Source, section_of_recipe, source_below

from .fingerprint import Answer, Fingerprint, Message
from .stock import StockModel, clear_load_errors, load_model, put_adapter


@dataclass(frozen=True)
class Local:
    """A model in this process."""

    stock: StockModel
    sees: bool = True

    def __str__(self) -> str:
        return "this process"

    def answer(self, messages: list[Message], max_tokens: int) -> Answer:
        """The model's answer."""
        return self.stock.answer(messages, max_tokens)

    def answer_of_base(self, messages: list[Message], max_tokens: int) -> Answer | None:
        """The answer without the adapter; None for a whole model."""
        model: Any = self.stock.model
        if not isinstance(model, PeftModel):
            return None
        with model.disable_adapter():
            return self.stock.answer(messages, max_tokens)


def with_peft(folder: Path, fingerprint: Fingerprint, base: str | None) -> Local:
    """An exported adapter on its base (or on `base`). Raises UserError if they cannot be loaded."""
    source = source_below(folder) if base is None else Source(base)
    stock = _loaded(folder, source, fingerprint)
    with clear_load_errors("PEFT cannot load the adapter", f"{folder}, on {source}"):
        put_adapter(stock, folder)
    return Local(stock)


def with_transformers(folder: Path, fingerprint: Fingerprint) -> Local:
    """A merged checkpoint or a base. Raises UserError if it cannot be loaded."""
    trusted = bool(section_of_recipe(folder, "model").get("trust_remote_code"))
    return Local(_loaded(folder, Source(str(folder), None, trusted), fingerprint))


def _loaded(folder: Path, source: Source, fingerprint: Fingerprint) -> StockModel:
    settings = {**source.arguments(), "template_arguments": fingerprint.template_arguments}
    with clear_load_errors("transformers cannot load the model", f"{folder}: {source}"):
        return load_model(source.model, fingerprint.dtype, **settings)
