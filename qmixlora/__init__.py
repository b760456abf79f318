"""Quantised, low-memory fine-tuning of multimodal LLMs with Conditional Mixture-of-LoRA (arXiv 2402.15896).

After `import qmixlora`, PEFT knows the method: `get_peft_model(model, qmixlora.MixLoraConfig(...))` and
`PeftModel.from_pretrained(model, folder)` work. Neither torch nor peft is imported before somebody needs them, so that
the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

from .registration import register_with_peft

__all__ = ["MixLoraConfig", "MixLoraModel", "routed_as"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("qmixlora.mixlora"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_with_peft()
