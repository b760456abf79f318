"""What benchmarks/servers.py serves: exports of a short demonstration and of a tiny Qwen3-VL; and prompts for them.

The tiny Qwen3-VL is the tests' own, random, with two tasks and images held to four tokens: a projector that was trained
hard, so that a server which leaves it out says other things.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "processors")]
import processor_packages  # noqa: E402

processor_packages.install()

from qmixlora.cli.quiet import quiet  # noqa: E402

quiet()

from rich.console import Console  # noqa: E402

from qmixlora.data import indices_by_task, load_conversations, load_split, open_images  # noqa: E402
from qmixlora.demo.run import run_demo  # noqa: E402
from qmixlora.export import Request, export  # noqa: E402
from qmixlora.export.fingerprints import as_asked  # noqa: E402
from qmixlora.export.targets import exported_tasks  # noqa: E402
from qmixlora.recipe import Recipe, load_recipe  # noqa: E402
from qmixlora.serving.fingerprint import Message  # noqa: E402
from qmixlora.training import train  # noqa: E402
from tests.families.checkpoint import make_checkpoint, make_data  # noqa: E402
from tests.families.variants import qwen3_vl  # noqa: E402

SHORT = ("train.max_steps=300", "export.polish=0", "export.samples=20")
PROMPTS = 20  # for each export, beside those of its fingerprint


@dataclass(frozen=True)
class Model:
    """A model that is served: `make` makes its run in a folder, `prompts` asks an export of it."""

    make: Callable[[Path], None]
    prompts: Callable[[Path, Path], list[list[Message]]]


def make_demo(folder: Path) -> None:
    """`run/` of a short demonstration, with every task as LoRA and as merged checkpoint."""
    run_demo(folder, SHORT, Console())


def make_qwen3_vl(folder: Path) -> None:
    """`run/` with LoRAs and merged checkpoints, and `low-rank/`, whose projectors are in the adapters."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    values = {
        "model": {"id": str(make_checkpoint(qwen3_vl.VARIANT, folder / "model")), "dtype": "float32"},
        "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0},
        "data": {"train": str(make_data(folder)), "max_length": 1500, "max_image_tokens": 4},
        "train": {
            "output": str(folder / "run"), "max_steps": 6, "micro_batch_size": 2, "gradient_accumulation": 1,
            "learning_rate": 5e-2, "max_new_tokens": 8, "save_every": None,
        },
        "export": {"polish": 0, "samples": 2},
    }  # fmt: skip
    run = train(Recipe.model_validate(values), console=Console())
    shutil.copytree(run, folder / "low-rank")
    export(run, Request(forms=("lora", "merged")), Console())
    export(folder / "low-rank", Request(projector="low-rank"), Console())


def held_out(run: Path, folder: Path) -> list[list[Message]]:
    """Questions of the test split for an export's task."""
    rows = load_split(load_recipe(str(run / "recipe.yaml")).data, "test")
    (task,) = exported_tasks(folder)
    indices = indices_by_task(rows)[task][:PROMPTS]
    return [as_asked(rows[index], open_images(rows[index]["images"])) for index in indices]


def crossed(run: Path, folder: Path) -> list[list[Message]]:
    """Every question of the data about every one of its images, and about none: the data has four samples."""
    rows = list(load_conversations(load_recipe(str(run / "recipe.yaml")).data.sources[0]))
    images: Sequence[list] = [open_images(row["images"]) for row in rows] + [[]]
    return [as_asked(row, [one.copy() for one in own]) for row, own in itertools.product(rows, images)][:PROMPTS]


MODELS = {"demo": Model(make_demo, held_out), "qwen3-vl": Model(make_qwen3_vl, crossed)}
