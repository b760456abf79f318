"""What benchmarks/servers.py serves: exports of tiny models, of a short demonstration and of a real language model; and
prompts for them.

The tiny ones are the tests' own, random, with two tasks and images held to four tokens: a projector that was trained
hard, so that a server which leaves it out says other things.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "processors")]
import processor_packages  # noqa: E402

processor_packages.install()

from qmixlora.cli.quiet import quiet  # noqa: E402

quiet()

from rich.console import Console  # noqa: E402

from qmixlora.data import indices_by_task, load_conversations, load_split, open_images  # noqa: E402
from qmixlora.demo import resolve  # noqa: E402
from qmixlora.demo.run import run_demo  # noqa: E402
from qmixlora.export import Request, export  # noqa: E402
from qmixlora.export.fingerprints import as_asked  # noqa: E402
from qmixlora.export.targets import Form  # noqa: E402
from qmixlora.recipe import load_recipe  # noqa: E402
from qmixlora.serving.fingerprint import Message  # noqa: E402
from qmixlora.training import train  # noqa: E402
from tests.families.run import train_variant  # noqa: E402
from tests.families.variant import Variant  # noqa: E402
from tests.families.variants import qwen2_5_vl, qwen3_vl  # noqa: E402

SHORT = ("train.max_steps=300", "export.polish=0", "export.samples=20")
REAL_TASKS = ("choice", "reason")
REAL = (  # one router for all layers, so that the mixture itself can be served
    "adapter.router=model", "train.max_steps=24", "train.micro_batch_size=8", "train.save_every=null",
    "train.eval_every=null", "train.max_new_tokens=16", "export.polish=0", "export.samples=4",
)  # fmt: skip
PROMPTS = 20  # for each export, beside those of its fingerprint
Prompts = Callable[[Path, str], list[list[Message]]]


@dataclass(frozen=True)
class Model:
    """A model that is served: `make` makes its run in a folder, `prompts` asks a run about a task.

    `by_bytes`: its tokenizer has a token for every byte and merges none, which llama.cpp's converter does not know.
    """

    make: Callable[[Path], None]
    prompts: Prompts
    by_bytes: bool = False


def make_demo(folder: Path) -> None:
    """`run/` of a short demonstration, with every task as LoRA and as merged checkpoint."""
    run_demo(folder, SHORT, Console())


def make_tiny(variant: Variant, forms: tuple[Form, ...], folder: Path) -> None:
    """`run/` with its exports, and `low-rank/`, whose projectors are in the adapters."""
    run = train_variant(variant, folder, Console(), max_new_tokens=8)
    shutil.copytree(run, folder / "low-rank")
    export(run, Request(forms=forms), Console())
    export(folder / "low-rank", Request(projector="low-rank"), Console())


def make_smollm2(folder: Path) -> None:
    """`run/` of some steps on SmolLM2-135M, with two tasks as LoRA and for llama.cpp, and the mixture as it is."""
    recipe = load_recipe("real-cpu", [*REAL, f"train.output={folder / 'run'}"])
    run = train(resolve(recipe, None, Console()), console=Console())
    export(run, Request(tasks=REAL_TASKS, forms=("lora", "gguf", "live-gguf")), Console())


def held_out(run: Path, task: str) -> list[list[Message]]:
    """Questions of the test split for a task."""
    rows = load_split(load_recipe(str(run / "recipe.yaml")).data, "test")
    indices = indices_by_task(rows)[task][:PROMPTS]
    return [as_asked(rows[index], open_images(rows[index]["images"])) for index in indices]


def held_out_words(run: Path, task: str) -> list[list[Message]]:
    """Different questions of the test split for a task, without their images."""
    rows = load_split(load_recipe(str(run / "recipe.yaml")).data, "test")
    asked = {repr(words): words for index in indices_by_task(rows)[task] if (words := as_asked(rows[index], []))}
    return list(asked.values())[:PROMPTS]


def crossed(run: Path, task: str, scaled: tuple[int, int] | None = None) -> list[list[Message]]:
    """Every question of the data about every one of its images, and about none: the data has four samples. `scaled` is
    the size of one more image, the last one brought to it.
    """
    rows = list(load_conversations(load_recipe(str(run / "recipe.yaml")).data.sources[0]))
    images: list[list] = [open_images(row["images"]) for row in rows]
    if scaled:
        images.append([images[-1][0].resize(scaled)])
    return [as_asked(row, [one.copy() for one in own]) for row, own in itertools.product(rows, [*images, []])]


# llama.cpp's converter takes the last matrix of this projector for one of a layer 2, which the tower has to have
DEEP = replace(qwen2_5_vl.VARIANT, make=partial(qwen2_5_vl.make, depth=3))
MODELS = {
    "demo": Model(make_demo, held_out),
    "qwen3-vl": Model(partial(make_tiny, qwen3_vl.VARIANT, ("lora", "merged", "gguf")), crossed, True),
    "qwen2.5-vl": Model(partial(make_tiny, DEEP, ("lora", "gguf")), partial(crossed, scaled=(28, 56)), True),
    "smollm2": Model(make_smollm2, held_out_words),
}
