"""Copies of exports in which something is wrong, for benchmarks/servers.py: what all servers can get wrong alike.

vllm_breaks.py and llama_breaks.py have the ways of each server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Broken:
    """Exports that are served wrongly, the one that is asked, and in words how; `command` is another one than the
    written script, `options` go behind it, `before` are exports whose prompts are asked first, and of which adapter.
    """

    how: str
    exports: Path
    asked: Path
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    before: tuple[tuple[Path, str], ...] = ()


Break = Callable[[Path, Path], Broken]  # of a run, in a scratch folder


def copied(run: Path, scratch: Path) -> Path:
    """A copy of a run's exports."""
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(run / "exports", scratch / "exports"))


def original(exports: Path) -> Path:
    """The model that the base of exports was made of."""
    return Path(json.loads((exports / "base" / "base.json").read_text(encoding="utf-8"))["model"])


def change_base(exports: Path) -> str:
    """Change weights of the base; returns how."""
    weights = exports / "base" / "model.safetensors"
    changed = {name: 1.3 * one if "down_proj" in name else one for name, one in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    return "another base: `down_proj` times 1.3"


def other_template(exports: Path, scratch: Path) -> Path:
    """A chat template of another wording."""
    template = scratch / "other.jinja"
    own = (exports / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text("say this : " + own, encoding="utf-8")
    return template
