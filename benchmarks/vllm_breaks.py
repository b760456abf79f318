"""Ways in which vLLM does not serve an export, for benchmarks/servers.py: what is changed in a copy of the exports.

All are of task `a` of the tiny Qwen3-VL, told to the server as a user would tell it; the server says nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from server_breaks import Break, Broken, change_base, copied, original, other_template


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def adapter_dropped(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    command = ("vllm", "serve", str(exports / "base"), "--served-model-name", "a", "--dtype", "float32")
    return Broken("no adapter: the base under the task's name", exports, exports / "a-lora", command=command)


def projector_dropped(run: Path, scratch: Path) -> Broken:
    """vLLM does it by itself: factors of the projector, without `--enable-tower-connector-lora`."""
    exports = copied(run.parent / "low-rank", scratch)
    base = json.loads((exports / "a-lora" / "adapter_config.json").read_text(encoding="utf-8"))
    command = ("vllm", "serve", base["base_model_name_or_path"], "--served-model-name", "base", "--dtype", "float32")
    command += ("--enable-lora", "--lora-modules", f"a={exports / 'a-lora'}")
    return Broken("`--projector low-rank`, whose half vLLM leaves out", exports, exports / "a-lora", command=command)


def another_alpha(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    config = exports / "a-lora" / "adapter_config.json"
    _edit(config, lora_alpha=2 * json.loads(config.read_text(encoding="utf-8"))["lora_alpha"])
    return Broken("`lora_alpha` twice as large", exports, exports / "a-lora")


def another_base(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    return Broken(change_base(exports), exports, exports / "a-lora")


def images_of_another_size(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    shutil.copyfile(original(exports) / "processor_config.json", exports / "base" / "processor_config.json")
    return Broken("the processor of the model as it was, without the run's image limit", exports, exports / "a-lora")


def another_chat_template(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    options = ("--chat-template", str(other_template(exports, scratch)))
    return Broken("`--chat-template` of another wording", exports, exports / "a-lora", options)


BREAKS: dict[str, Break] = {
    "adapter dropped": adapter_dropped,
    "projector dropped": projector_dropped,
    "another alpha": another_alpha,
    "another base": another_base,
    "images of another size": images_of_another_size,
    "another chat template": another_chat_template,
}
