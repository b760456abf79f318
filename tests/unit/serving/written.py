"""What the tests of written files share: exports of other makes, and the words that a script gives a program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from qmixlora.serving.files.exports import read_exports
from qmixlora.serving.files.folder import write_files
from qmixlora.serving.files.places import PLACES


def written(exports: Path, server: str) -> Path:
    return write_files(read_exports(exports), server, PLACES[server])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def words_given(script: Path, program: str, *options: str) -> list[str]:
    """The words that a script gives a program of this name, started from another folder; paths are looked up."""
    folder = script.parents[2] / "programs"
    folder.mkdir(exist_ok=True)
    (folder / program).write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    (folder / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(script), *options], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    where, *words = done.stdout.splitlines()
    assert Path(where).samefile(script.parents[1])
    return words


def gguf_of(exports: Path) -> Path:
    """An export for llama.cpp beside the others; what is in the file is not read here."""
    folder = exports / "a-gguf"
    folder.mkdir()
    (folder / "a.gguf").touch()
    for file in ("fingerprint.json", "base.json", "recipe.yaml"):
        shutil.copyfile(exports / "a-lora" / file, folder / file)
    return folder


def on_the_model_as_it_is(export: Path, model: str = "some/model", **changes: Any) -> Path:
    """An export as one of a run whose projector was frozen: on a model of the hub, by its recipe and its config."""
    (export / "base.json").unlink()
    recipe = yaml.safe_load((export / "recipe.yaml").read_text())
    recipe["model"] |= {"id": model, **changes}
    (export / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if (export / "adapter_config.json").is_file():
        edit(export / "adapter_config.json", base_model_name_or_path=model, revision=None)
    return export


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]
