"""Registration with PEFT: importing peft also registers the method, without importing it now.

`qmixlora` installs a finder that finds peft as every other finder would, and has the module's own loader run, then
ours. The loader stays peft's own for everybody who asks it (`importlib.resources`, `inspect`, pickle).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHOD = "qmixlora.mixlora"  # importing it registers it


class PeftFinder(MetaPathFinder):
    """Finds peft as the finders after it do, and adds the registration to the end of its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _register_after_loading(spec)
                return spec
        return None


def register_with_peft() -> None:
    """Register the method now if peft is imported already, else when it will be."""
    if "peft" in sys.modules:
        importlib.import_module(METHOD)
    elif not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())


def _register_after_loading(spec: ModuleSpec) -> None:
    """Have the spec's own loader import the method once it has executed the module."""
    loader = spec.loader
    assert loader is not None, "a spec without a loader is a namespace package"
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        importlib.import_module(METHOD)

    loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader, which loads peft alone
