"""Ways in which llama-server does not serve an export, for benchmarks/servers.py; told as to vLLM.

All are of task `a` of the tiny Qwen2.5-VL; the server says nothing of any.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from server_breaks import Break, Broken, change_base, copied, original, other_template
from server_environments import convert
from server_forms import written_for

SERVER = "llama-server"


def _edited(exports: Path, name: str, pattern: str, replacement: str) -> Path:
    """A script that serve-files writes, with something else in a copy of it; `pattern` is there."""
    script = written_for(SERVER, exports) / name
    text, count = re.subn(pattern, replacement, script.read_text(encoding="utf-8"))
    assert count, f"{pattern} is not in {script}"
    other = script.with_name(f"broken-{name}")
    other.write_text(text, encoding="utf-8")
    return other


def _started_otherwise(how: str, pattern: str, *before: tuple[str, str]) -> Break:
    def make(run: Path, scratch: Path) -> Broken:
        exports = copied(run, scratch)
        start = _edited(exports, "start.sh", pattern, "")
        asked = tuple((exports / folder, name) for folder, name in before)
        return Broken(how, exports, exports / "a-gguf", command=("sh", str(start)), before=asked)

    return make


def _converted_otherwise(how: str, lost: str, pattern: str, replacement: Callable[[Path], str]) -> Break:
    def make(run: Path, scratch: Path) -> Broken:
        exports = copied(run, scratch)
        script = _edited(exports, "convert.sh", pattern, replacement(exports))
        kept = {path: path.read_bytes() for path in script.parent.glob("*.gguf") if path.name != lost}
        convert(script, by_bytes=True)
        for path, content in kept.items():
            path.write_bytes(content)
        return Broken(how, exports, exports / "a-gguf")

    return make


def another_scale(run: Path, scratch: Path) -> Broken:
    import gguf

    exports = copied(run, scratch)
    field = gguf.GGUFReader(exports / "a-gguf" / "a.gguf", "r+").get_field("adapter.lora.alpha")
    field.parts[field.data[0]][0] *= 2
    return Broken("`adapter.lora.alpha` twice as large", exports, exports / "a-gguf")


def another_base(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    how = change_base(exports)
    (exports / f"serve-{SERVER}" / "base.gguf").unlink()
    return Broken(how, exports, exports / "a-gguf")


def another_chat_template(run: Path, scratch: Path) -> Broken:
    exports = copied(run, scratch)
    options = ("--chat-template-file", str(other_template(exports, scratch)))
    return Broken("`--chat-template-file` of another wording", exports, exports / "a-gguf", options)


BREAKS: dict[str, Break] = {
    "adapter dropped": _started_otherwise("no `--lora-scaled`", r"--lora-scaled \S+ \\\n"),
    "another alpha": another_scale,
    "another base": another_base,
    "fewer bits": _converted_otherwise("the base in 8 bits: `--outtype q8_0`", "base.gguf", "f32", lambda _: "q8_0"),
    "projector dropped": _converted_otherwise(
        "the `mmproj` of the model as it was",
        "mmproj.gguf",
        r"(?<=\nbase=)base",
        lambda exports: str(original(exports)),
    ),
    "images of another size": _started_otherwise(
        "no `--image-max-tokens`: the converter leaves the run's limit out",
        r" --image-min-tokens \d+ --image-max-tokens \d+",
    ),
    "another chat template": another_chat_template,
    "cached prompts": _started_otherwise(
        "no `--no-cache-prompt`; both tasks were asked before",
        r"--no-cache-prompt \\\n",
        ("a-gguf", "b"),
        ("b-gguf", "a"),
    ),
}
