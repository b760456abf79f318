"""Quantised, low-memory fine-tuning of multimodal LLMs with Conditional Mixture-of-LoRA (arXiv 2402.15896).

After `import qmixlora`, PEFT knows the method: `get_peft_model(model, qmixlora.MixLoraConfig(...))` and
`PeftModel.from_pretrained(model, folder)` work. Neither torch nor peft is imported before somebody needs them, so that
the command line answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MixLoraConfig", "MixLoraModel", "routed_as"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("qmixlora.mixlora"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisteringLoader(Loader):
    """Runs peft's own loader, then registers the method."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("qmixlora.mixlora")


class _PeftFinder(MetaPathFinder):
    """Finds peft as every other finder would, and has it loaded by `_RegisteringLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


if "peft" in sys.modules:
    importlib.import_module("qmixlora.mixlora")
else:
    sys.meta_path.insert(0, _PeftFinder())
