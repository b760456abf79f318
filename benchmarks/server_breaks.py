"""Ways in which a server does not serve an export, for benchmarks/servers.py: what is changed in a copy of the exports.

All are of task `a` of the tiny Qwen3-VL, told to the server as a user would tell it; the server says nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Broken:
    """Exports that are served wrongly, the one that is asked, and in words how; `command` is another one than the
    written script, `options` go behind it.
    """

    how: str
    exports: Path
    asked: Path
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def _copied(run: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(run / "exports", scratch / "exports"))


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def _original(exports: Path) -> Path:
    return Path(json.loads((exports / "base" / "base.json").read_text(encoding="utf-8"))["model"])


def adapter_dropped(run: Path, scratch: Path) -> Broken:
    exports = _copied(run, scratch)
    command = ("vllm", "serve", str(exports / "base"), "--served-model-name", "a", "--dtype", "float32")
    return Broken("no adapter: the base under the task's name", exports, exports / "a-lora", command=command)


def projector_dropped(run: Path, scratch: Path) -> Broken:
    """vLLM does it by itself: factors of the projector, without `--enable-tower-connector-lora`."""
    exports = _copied(run.parent / "low-rank", scratch)
    base = json.loads((exports / "a-lora" / "adapter_config.json").read_text(encoding="utf-8"))
    command = ("vllm", "serve", base["base_model_name_or_path"], "--served-model-name", "base", "--dtype", "float32")
    command += ("--enable-lora", "--lora-modules", f"a={exports / 'a-lora'}")
    return Broken("`--projector low-rank`, whose half vLLM leaves out", exports, exports / "a-lora", command=command)


def another_alpha(run: Path, scratch: Path) -> Broken:
    exports = _copied(run, scratch)
    config = exports / "a-lora" / "adapter_config.json"
    _edit(config, lora_alpha=2 * json.loads(config.read_text(encoding="utf-8"))["lora_alpha"])
    return Broken("`lora_alpha` twice as large", exports, exports / "a-lora")


def another_base(run: Path, scratch: Path) -> Broken:
    exports = _copied(run, scratch)
    weights = exports / "base" / "model.safetensors"
    changed = {name: 1.3 * one if "down_proj" in name else one for name, one in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    return Broken("another base: `down_proj` times 1.3", exports, exports / "a-lora")


def images_of_another_size(run: Path, scratch: Path) -> Broken:
    exports = _copied(run, scratch)
    shutil.copyfile(_original(exports) / "processor_config.json", exports / "base" / "processor_config.json")
    return Broken("the processor of the model as it was, without the run's image limit", exports, exports / "a-lora")


def another_chat_template(run: Path, scratch: Path) -> Broken:
    exports = _copied(run, scratch)
    template = scratch / "other.jinja"
    own = (exports / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text("say this : " + own, encoding="utf-8")
    options = ("--chat-template", str(template))
    return Broken("`--chat-template` of another wording", exports, exports / "a-lora", options)


BREAKS = {
    "adapter dropped": adapter_dropped,
    "projector dropped": projector_dropped,
    "another alpha": another_alpha,
    "another base": another_base,
    "images of another size": images_of_another_size,
    "another chat template": another_chat_template,
}
