"""Shared parts: real ones, tiny and random, made here. No hub, no mocks."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; what wants a GPU is in benchmarks/gpu.py

import contextlib
import importlib.util
import io
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import transformers
from qmixlora.cli import main
from transformers import LlavaForConditionalGeneration

from qmixlora.demo.backbone import make_config, make_processor
from qmixlora.demo.dataset import make_dataset
from qmixlora.recipe import Recipe, validate

# a script's background jobs are started to ignore Ctrl-C, and what tests start would, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # xdist runs one worker per core

# the same inputs on every machine, however slow it is
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("reproducible")


def pytest_configure() -> None:
    if importlib.util.find_spec("torchvision") is None:
        raise pytest.UsageError(
            "The tests need torchvision for real image processors; `make test` installs it for them."
        )


class Completed(NamedTuple):
    """What a command line left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str


CommandLine = Callable[..., Completed]


@pytest.fixture(scope="session")
def qmixlora() -> CommandLine:
    """The command line, run in this process: `qmixlora("eval", run, "--json", stdin="", cwd=None)`."""

    def call(*arguments: object, stdin: str = "", cwd: Path | None = None) -> Completed:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, as_it_was(), pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["qmixlora", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setenv("COLUMNS", "200")
            if cwd is not None:
                patch.chdir(cwd)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main.run()
        return Completed(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return call


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Undo what the command line changes for its whole process to keep other libraries quiet."""
    environment, bitsandbytes = dict(os.environ), logging.getLogger("bitsandbytes")
    level, shows_progress = bitsandbytes.level, transformers.utils.logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        bitsandbytes.setLevel(level)
        if shows_progress:
            transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def processor() -> Any:
    return make_processor()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A random LLaVA of two decoder layers as an ordinary checkpoint folder, with a real processor."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(make_config(processor.tokenizer, layers=2, width=64))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded data set, its splits cut to a few samples of each task."""
    from qmixlora.demo import dataset

    sizes = dict(dataset.SPLITS)
    dataset.SPLITS.update(train=6, validation=1, test=2)
    try:
        return make_dataset(tmp_path_factory.mktemp("data") / "set")
    finally:
        dataset.SPLITS.update(sizes)


@pytest.fixture(scope="session")
def make_recipe_in(backbone: Path, data: Path) -> Callable[..., Recipe]:
    """A recipe for the random backbone, its run in a folder; keyword arguments are sections with what to change."""

    def make(folder: Path, **sections: dict[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "model": {"id": str(backbone), "dtype": "float32"},
            "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0},
            "data": {"train": str(data / "train.json"), "test": str(data / "test.json"), "max_length": 128},
            "train": {
                "output": str(folder / "run"),
                "max_steps": 4,
                "micro_batch_size": 4,
                "gradient_accumulation": 1,
                "learning_rate": 1e-2,
                "log_every": 1,
                "max_new_tokens": 4,
            },
        }
        for name, section in sections.items():
            values[name].update(section)
        return validate(values, "test")

    return make


@pytest.fixture
def make_recipe(make_recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """The same, with its run in the test's own folder."""
    return partial(make_recipe_in, tmp_path)


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write
