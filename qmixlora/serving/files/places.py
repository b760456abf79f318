"""The servers that files are written for: what each is started with, and how a request names a task.

vLLM's options are those of 0.32, SGLang's of 0.5.23, llama-server's of the llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmixlora.bases import Source, read_record
from qmixlora.errors import UserError

from .exports import Adapter, image_limits

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
SLOTS = 8  # adapters in one batch at most: each takes memory on the card
CONVERTED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CONVERT, OF = "convert.sh", "# of "  # the script that makes GGUF of a base, and its line that says of which
Lines = list[list[str]]  # a command, an option with its values a line


@dataclass(frozen=True)
class Served:
    """Adapters on one base, for one server.

    `base` is the base as it is typed in the folder of the exports, `own` the folder that is written, as it is typed
    there; `dtype` is that of the computation (None: nothing says it).
    """

    adapters: tuple[Adapter, ...]
    base: Source
    folder: Path
    own: str
    dtype: str | None

    def typed(self, adapter: Adapter) -> str:
        """The path of an adapter, in the folder of the exports."""
        return adapter.path.relative_to(self.folder).as_posix()

    @property
    def alone(self) -> str:
        """What the server calls the base without any adapter."""
        name, taken = "base", {adapter.name for adapter in self.adapters}
        while name in taken:
            name += "_"
        return name

    @property
    def tallest(self) -> int:
        return max(adapter.rank or 1 for adapter in self.adapters)


@dataclass(frozen=True)
class Place:
    """A server: `form` is the exports that it takes, `port` its own; `image` a container's (None: the command tells a
    server that runs already of the adapters, and there is no compose file), `environment` what the container needs.

    `start` gives the lines of its command, `before` lines of shell ahead of them, `request` what a request says so that
    a task's adapter answers, `files` what else is written. `check` is the option of `qmixlora check`, `named` makes a
    name that the server takes of a task's, `suffix` is what the server puts behind it; `measured` says whether these
    files were run.
    """

    title: str
    form: str
    port: int
    image: str | None
    start: Callable[[Served], Lines]
    request: Callable[[Served, Adapter], dict[str, Any]]
    check: str
    about: str
    measured: str
    files: Callable[[Served], Mapping[str, str]] = lambda served: {}
    before: Callable[[Served], str] = lambda served: ""
    environment: Mapping[str, str] = field(default_factory=dict)
    named: Callable[[str], str] = str
    suffix: str = ""


def vllm_rank(tallest: int) -> int:
    """The least rank that vLLM can be told of and that holds such adapters; their own where it takes none so high."""
    return min((rank for rank in VLLM_RANKS if rank >= tallest), default=tallest)


def _vllm(served: Served) -> Lines:
    count, tallest = len(served.adapters), served.tallest
    if tallest > VLLM_RANKS[-1]:
        raise UserError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and one of these has {tallest}.",
            where=", ".join(adapter.name for adapter in served.adapters if adapter.rank == tallest),
            fix=f"Cut it: qmixlora export RUN --all --rank {VLLM_RANKS[-1]}.",
        )
    return [
        ["vllm", "serve", served.base.model, *options_of_source(served.base)],
        ["--served-model-name", served.alone],
        *([["--dtype", served.dtype]] if served.dtype else []),
        ["--max-model-len", "auto"],
        ["--enable-lora", "--max-lora-rank", str(vllm_rank(tallest))],
        ["--max-loras", str(min(count, SLOTS)), "--max-cpu-loras", str(count)],
        ["--lora-modules", *(_as_json(name=one.name, path=served.typed(one)) for one in served.adapters)],
        ["--host", "127.0.0.1", "--port", "8000"],
    ]


def _sglang(served: Served) -> Lines:
    count = len(served.adapters)
    return [
        ["python3", "-m", "sglang.launch_server", "--model-path", served.base.model, *options_of_source(served.base)],
        ["--served-model-name", served.alone],
        *([["--dtype", served.dtype]] if served.dtype else []),
        ["--enable-lora", "--max-lora-rank", str(served.tallest)],
        ["--max-loras-per-batch", str(min(count + 1, SLOTS))],  # the base alone counts as one
        ["--lora-paths", *(_as_json(lora_name=one.name, lora_path=served.typed(one)) for one in served.adapters)],
        ["--host", "127.0.0.1", "--port", "30000"],
    ]


def options_of_source(base: Source) -> list[str]:
    """Of vLLM and SGLang alike."""
    revision = [] if base.revision is None else ["--revision", base.revision]
    return [*revision, *(["--trust-remote-code"] if base.trust_remote_code else [])]


def _as_json(**fields: str) -> str:
    """An adapter in the form that both take for any name; in NAME=PATH a name ends at its first `=`."""
    return json.dumps(fields, ensure_ascii=False)


def options_of_stops(stops: Sequence[int]) -> list[str]:
    """The option of llama-server by which a token ends answers; a request's `stop` does not see special tokens."""
    return ["--override-kv", f"tokenizer.ggml.eot_token_id=int:{stops[0]}"]


def options_of_images(limits: tuple[int, int]) -> list[str]:
    """The options of llama-server for the fewest and the most tokens of an image."""
    return ["--image-min-tokens", str(limits[0]), "--image-max-tokens", str(limits[1])]


def _llama_server(served: Served) -> Lines:
    stops = next((one.stops for one in served.adapters if one.stops), ())
    return [
        ["llama-server", "--model", f"{served.own}/base.gguf"],
        ["--alias", served.alone],
        *([options_of_stops(stops)] if stops else []),
        # given twice, the last one counts; without scales all of them are applied to a request that names none
        ["--lora-scaled", ",".join(f"{served.typed(adapter)}:0" for adapter in served.adapters)],
        # it takes the states of one adapter's prompt for another's (ggml-org/llama.cpp issue 26207)
        ["--no-cache-prompt"],
        ["--host", "127.0.0.1", "--port", "8080"],
    ]


def _with_eyes(served: Served) -> str:
    """The part that sees, where the base has been converted with it, which leaves the processor's limits out. One
    request at a time then: of several, the server reads an image with the adapter of another one.
    """
    own, folders = shlex.quote(f"{served.own}/mmproj.gguf"), [one.folder for one in served.adapters]
    limits = next(filter(None, map(image_limits, [*folders, served.folder / served.base.model])), None)
    held = "".join(f" {word}" for word in options_of_images(limits)) if limits else ""
    return f'[ -f {own} ] && set -- --mmproj {own} --parallel 1{held} "$@"\n'


def _ollama(served: Served) -> Lines:
    files = {one.name: f"{served.own}/{one.name}.Modelfile" for one in served.adapters}
    return [["ollama", "create", _for_ollama(name), "-f", file] for name, file in files.items()]


def _for_ollama(name: str) -> str:
    """A model's name for Ollama: up to 80 letters of ASCII, digits, `_`, `-` and `.`, with a digest where that is not
    the task's own.
    """
    kept = re.sub(r"^[-.]|[^A-Za-z0-9_.-]", "_", name)[:80]
    return name if kept == name else f"{kept[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _modelfiles(served: Served) -> dict[str, str]:
    """A Modelfile for each task, and the conversion of the base."""
    files = _converted(served)
    for adapter in served.adapters:
        stops = (f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in adapter.stop_strings)
        lines = ("FROM ./base.gguf", f"ADAPTER ../{served.typed(adapter)}", "PARAMETER temperature 0", *stops)
        files[f"{adapter.name}.Modelfile"] = "\n".join(lines) + "\n"
    return files


def _converted(served: Served) -> dict[str, str]:
    kind = CONVERTED.get(served.dtype or "", "f16")
    convert = f'python "$LLAMA_CPP/convert_hf_to_gguf.py" "$base" --outtype {kind}'
    record = read_record(served.folder / served.base.model) or {}
    of = ", ".join([str(served.base), kind, *(f"{name} {record[name]}" for name in record)])
    script = f"""#!/bin/sh
# The base as GGUF, once: LLAMA_CPP is a checkout of llama.cpp, python has what its converter requires.
{OF}{of}
cd "$(dirname "$0")/.." || exit 1
base={served.base.folder_in_shell(served.folder)} || exit 1
{convert} --outfile {served.own}/base.gguf || exit 1
# the part that sees; where the converter refuses it (LLaVA-1.5), the server takes no images
{convert} --outfile {served.own}/mmproj.gguf --mmproj || echo "No mmproj: the server will take no images." >&2
"""
    return {CONVERT: script}


def _by_name(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": adapter.name}


def _by_ollamas_name(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": _for_ollama(adapter.name)}


def _by_suffix(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": f"{served.alone}:{adapter.name}"}


def _by_scales(served: Served, adapter: Adapter) -> dict[str, Any]:
    scales = [{"id": number, "scale": float(one == adapter)} for number, one in enumerate(served.adapters)]
    return {"model": served.alone, "lora": scales}


NOT_RUN = "Written by the documentation and the source of the server, and never run by the authors of qmixlora."
PLACES = {
    "vllm": Place(
        title="vLLM",
        form="lora",
        port=8000,
        image="vllm/vllm-openai:latest",
        start=_vllm,
        request=_by_name,
        check="--url",
        about="vLLM takes one adapter per request, by its name as the model's; `{base}` is the model without any.",
        measured="`benchmarks/servers.py` runs this command (vLLM 0.32 on a CPU); the compose file was not run.",
    ),
    "sglang": Place(
        title="SGLang",
        form="lora",
        port=30000,
        image="lmsysorg/sglang:latest",
        start=_sglang,
        request=_by_suffix,
        check="--url",
        about="SGLang takes one adapter per request, as `{base}:NAME`. With the adapter's name alone it answers as the "
        "base, without a word.",
        measured=NOT_RUN,
    ),
    "llama-server": Place(
        title="llama-server",
        form="gguf",
        port=8080,
        image="ghcr.io/ggml-org/llama.cpp:server",
        start=_llama_server,
        request=_by_scales,
        check="--llama-server",
        about="llama-server takes a scale for each of its adapters per request. Make the base first, once: "
        "`LLAMA_CPP=... sh convert.sh`. It mixes adapters up where it caches prompts, and images of several requests "
        "at once: the script turns both off.",
        measured="`benchmarks/servers.py` runs both scripts (llama-server on a CPU); the compose file was not run.",
        files=_converted,
        before=_with_eyes,
        environment={"PATH": "/app:/usr/local/bin:/usr/bin:/bin"},  # the image has its programs in /app
    ),
    "ollama": Place(
        title="Ollama",
        form="gguf",
        port=11434,
        image=None,
        start=_ollama,
        request=_by_ollamas_name,
        check="--url",
        about="In Ollama each task is a model of its own, on one base. Make the base first, once: "
        "`LLAMA_CPP=... sh convert.sh`. Ollama writes prompts by a template of its own for the chat templates that it "
        "knows; `qmixlora check` tells if it is another one. The models take no images: nobody tried a second `FROM`.",
        measured=NOT_RUN,
        files=_modelfiles,
        named=_for_ollama,
        suffix=":latest",
    ),
}
