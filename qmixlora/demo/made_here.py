"""What `embedded` and `real` in a recipe stand for: backbones and data sets that are made on this machine, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from qmixlora.files import cache_folder
from qmixlora.progress import Tell, progress
from qmixlora.recipe import EMBEDDED, REAL

from .backbone import backbone_folder, make_backbone
from .dataset import make_dataset
from .real.backbone import make_real_backbone, real_backbone_folder
from .real.dataset import make_real_dataset

Make = Callable[[Path, Tell, Console], Path]


@dataclass(frozen=True)
class BackboneMaker:
    """How a backbone is made, where it is cached, and what is said of it before."""

    folder: Callable[[], Path]
    make: Make
    announced: str


@dataclass(frozen=True)
class DataSetMaker:
    """How a data set is made, and its name in the cache."""

    make: Callable[[Path], Path]
    cached_as: str


def _make_embedded(folder: Path, tell: Tell, console: Console) -> Path:
    return make_backbone(folder, tell)


def _make_real(folder: Path, tell: Tell, console: Console) -> Path:
    return make_real_backbone(folder, tell)


BACKBONES = {
    EMBEDDED: BackboneMaker(backbone_folder, _make_embedded, "from scratch, once (about a minute on two cores)"),
    REAL: BackboneMaker(
        real_backbone_folder,
        _make_real,
        "SmolLM2-135M learns to see, once (some 20 minutes of CPU time; goes on where it was interrupted)",
    ),
}
DATA_SETS = {
    EMBEDDED: DataSetMaker(make_dataset, "embedded-data-v3"),
    REAL: DataSetMaker(make_real_dataset, "real-data-v1"),
}


def make_data(name: str, folder: Path | None) -> Path:
    """Make a data set in a folder, or in the cache. Raises UserError as its maker."""
    maker = DATA_SETS[name]
    return maker.make(folder or cache_folder() / maker.cached_as).resolve()


def make_with_progress(name: str, console: Console) -> Path:
    """A backbone in its cache, with a progress bar and the time left (plain lines off a terminal). Raises UserError as
    its maker.
    """
    maker = BACKBONES[name]
    folder = maker.folder()
    if (folder / "config.json").is_file():
        return folder
    console.print(
        f"[bold]Making the backbone[/bold] {maker.announced}: {escape(str(folder))}", highlight=False, soft_wrap=True
    )
    with progress("captions", console) as tell:
        return maker.make(folder, tell, console)
