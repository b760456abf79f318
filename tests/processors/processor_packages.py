"""torchvision for the tests on every machine: found where nothing else provides it, usable on a torch without CUDA.

The processors of most families need torchvision. Its ordinary wheel is built for CUDA, so its C++ operators do not load
beside a torch for the CPU; its Python part, which is all that image processors use, then only misses the schemas of two
operators. The wheel therefore lies in a folder of its own, out of sight of `make demo` and of users, and the finder of
this module looks into it after all other finders. A torchvision in the environment itself is found first, untouched.

Nothing here imports torch before somebody imports torchvision.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("torchvision", "num2words")
FOLDER = Path(sys.prefix) / "processors"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
FAKED = ("nms", "qnms")  # torchvision registers fake kernels for these even where its operators did not load
_libraries: list[Any] = []  # what a torch.library.Library defines goes when nothing holds it


class ProcessorPackages(DistributionFinder):
    """Finds the packages of `FOLDER` and their metadata, when no finder before it does."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, [str(FOLDER)], target)
        if spec is not None and name == "torchvision":
            _define_operators_before_loading(spec)
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        name = context.name if context is not None else None
        if name is None or name in PACKAGES:
            yield from MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name, path=[str(FOLDER)]))


def install() -> None:
    """Append the finder to those of this process, once."""
    if not any(isinstance(finder, ProcessorPackages) for finder in sys.meta_path):
        sys.meta_path.append(ProcessorPackages())


def _define_operators_before_loading(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        _define_missing_operators()
        execute(module)

    loader.exec_module = exec_module


def _define_missing_operators() -> None:
    """Load torchvision's operators, or else declare those that it registers fake kernels for."""
    torch = importlib.import_module("torch")
    try:
        torch.ops.load_library(str(FOLDER / "torchvision" / "_C.so"))
    except OSError:  # built for another torch than the one that is here
        library = torch.library.Library("torchvision", "DEF")
        for operator in FAKED:
            library.define(operator + SCHEMA)
        _libraries.append(library)
