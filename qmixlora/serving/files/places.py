"""The servers that files are written for: what each is started with, and how a request names a task.

vLLM's options are those of 0.32, SGLang's of 0.5.23, llama-server's of the llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmixlora.errors import UserError

from .exports import Adapter, image_limits

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
SLOTS = 8  # adapters in one batch at most: each takes memory on the card
CONVERTED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Lines = list[list[str]]  # a command, an option with its values a line


@dataclass(frozen=True)
class Served:
    """Adapters on one base, for one server.

    `base` is the base as it is typed in the folder of the exports, `own` the folder that is written, as it is typed
    there; `dtype` is that of the fingerprints (None: there are none).
    """

    adapters: tuple[Adapter, ...]
    base: str
    folder: Path
    own: str
    dtype: str | None

    def typed(self, adapter: Adapter) -> str:
        """The path of an adapter, in the folder of the exports."""
        return adapter.path.relative_to(self.folder).as_posix()

    @property
    def tallest(self) -> int:
        return max(adapter.rank or 1 for adapter in self.adapters)


@dataclass(frozen=True)
class Place:
    """A server: `form` is the exports that it takes, `port` its own; `image` a container's (None: the command tells a
    server that runs already of the adapters, and there is no compose file), `environment` what the container needs.

    `start` gives the lines of its command, `before` lines of shell ahead of them, `request` what a request says so that
    a task's adapter answers, `files` what else is written. `check` is the option of `qmixlora check`, `suffix` what the
    server puts behind a task's name; `measured` says whether these files were run.
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
    suffix: str = ""


def _vllm(served: Served) -> Lines:
    count, tallest = len(served.adapters), served.tallest
    ranks = [rank for rank in VLLM_RANKS if rank >= tallest]
    if not ranks:
        raise UserError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and one of these has {tallest}.",
            where=", ".join(adapter.name for adapter in served.adapters if adapter.rank == tallest),
            fix=f"Cut it: qmixlora export RUN --all --rank {VLLM_RANKS[-1]}.",
        )
    return [
        ["vllm", "serve", served.base],
        ["--served-model-name", "base"],
        *([["--dtype", served.dtype]] if served.dtype else []),
        ["--max-model-len", "auto"],
        ["--enable-lora", "--max-lora-rank", str(ranks[0])],
        ["--max-loras", str(min(count, SLOTS)), "--max-cpu-loras", str(count)],
        ["--lora-modules", *(f"{adapter.name}={served.typed(adapter)}" for adapter in served.adapters)],
        ["--host", "127.0.0.1", "--port", "8000"],
    ]


def _sglang(served: Served) -> Lines:
    count = len(served.adapters)
    return [
        ["python3", "-m", "sglang.launch_server", "--model-path", served.base],
        ["--served-model-name", "base"],
        *([["--dtype", served.dtype]] if served.dtype else []),
        ["--enable-lora", "--max-lora-rank", str(served.tallest)],
        ["--max-loras-per-batch", str(min(count + 1, SLOTS))],  # the base alone counts as one
        ["--lora-paths", *(f"{adapter.name}={served.typed(adapter)}" for adapter in served.adapters)],
        ["--host", "127.0.0.1", "--port", "30000"],
    ]


def _llama_server(served: Served) -> Lines:
    return [
        ["llama-server", "--model", f"{served.own}/base.gguf"],
        ["--alias", "base"],
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
    own, limits = shlex.quote(f"{served.own}/mmproj.gguf"), image_limits(served.folder / served.base)
    held = f" --image-min-tokens {limits[0]} --image-max-tokens {limits[1]}" if limits else ""
    return f'[ -f {own} ] && set -- --mmproj {own} --parallel 1{held} "$@"\n'


def _ollama(served: Served) -> Lines:
    return [["ollama", "create", one.name, "-f", f"{served.own}/{one.name}.Modelfile"] for one in served.adapters]


def _modelfiles(served: Served) -> dict[str, str]:
    """A Modelfile for each task, and the conversion of the base."""
    files = _converted(served)
    for adapter in served.adapters:
        lines = ("FROM ./base.gguf", f"ADAPTER ../{served.typed(adapter)}", "PARAMETER temperature 0")
        files[f"{adapter.name}.Modelfile"] = "\n".join(lines) + "\n"
    return files


def _converted(served: Served) -> dict[str, str]:
    kind = CONVERTED.get(served.dtype or "", "f16")
    convert = f'python "$LLAMA_CPP/convert_hf_to_gguf.py" {shlex.quote(served.base)} --outtype {kind}'
    script = f"""#!/bin/sh
# The base as GGUF, once: LLAMA_CPP is a checkout of llama.cpp, python has what its converter requires.
cd "$(dirname "$0")/.." || exit 1
{convert} --outfile {served.own}/base.gguf || exit 1
# the part that sees; where the converter refuses it (LLaVA-1.5), the server takes no images
{convert} --outfile {served.own}/mmproj.gguf --mmproj || echo "No mmproj: the server will take no images." >&2
"""
    return {"convert.sh": script}


def _by_name(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": adapter.name}


def _by_suffix(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": f"base:{adapter.name}"}


def _by_scales(served: Served, adapter: Adapter) -> dict[str, Any]:
    return {"model": "base", "lora": [{"id": i, "scale": float(o == adapter)} for i, o in enumerate(served.adapters)]}


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
        about="vLLM takes one adapter per request, by its name as the model's; `base` is the model without any.",
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
        about="SGLang takes one adapter per request, as `base:NAME`. With the adapter's name alone it answers as the "
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
        request=_by_name,
        check="--url",
        about="In Ollama each task is a model of its own, on one base. Make the base first, once: "
        "`LLAMA_CPP=... sh convert.sh`. Ollama writes prompts by a template of its own for the chat templates that it "
        "knows; `qmixlora check` tells if it is another one. The models take no images: nobody tried a second `FROM`.",
        measured=NOT_RUN,
        files=_modelfiles,
        suffix=":latest",
    ),
}
