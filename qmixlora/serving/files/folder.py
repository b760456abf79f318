"""The folder of files for one server: how it is started, who is asked how, and the check of every task."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qmixlora.errors import UserError, typed
from qmixlora.files import link_or_copy, replacing, write_json
from qmixlora.serving.fingerprint import Prompt

from . import ask
from .exports import Adapter, Exports
from .places import CONVERT, OF, Place, Served

START, COMPOSE, TASKS, README = "start.sh", "compose.yaml", "tasks.json", "README.md"
MOUNTED = "/exports"  # where a container has the folder of the exports
CODE = "Python code of {model} runs in the server, since the run's recipe says model.trust_remote_code: true."
GPU = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}}


def write_files(exports: Exports, name: str, place: Place) -> Path:
    """Write the files for one server into `serve-NAME/` among the exports; returns that folder.

    A folder that an earlier call wrote is replaced; a base that was converted into it stays.

    Raises:
        UserError: an adapter that the server does not take, or takes in part; adapters on several bases; none at all; a
            base that was converted of another one, or to another type.
    """
    served = _served(exports, name, place)
    folder = exports.folder / served.own
    files, converted = place.files(served), list(folder.glob("*.gguf"))
    if converted:
        _check_converted(folder, converted, files)
    script = _script(place, served)
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / START).write_text(script, encoding="utf-8")
        requests = {adapter.name: _request(place, served, adapter) for adapter in served.adapters}
        write_json(temporary / TASKS, {"url": f"http://127.0.0.1:{place.port}", "tasks": requests})
        shutil.copyfile(ask.__file__, temporary / "ask.py")
        for other, text in files.items():
            (temporary / other).write_text(text, encoding="utf-8")
        if place.image is not None:
            (temporary / COMPOSE).write_text(_compose(served, name, place), encoding="utf-8")
        (temporary / README).write_text(_readme(exports, served, place), encoding="utf-8")
        for file in converted:
            _keep(file, temporary / file.name)
    return folder


def _keep(file: Path, path: Path) -> None:
    """Put a converted file, or a link to one, into the new folder too; the former one has it until it is replaced."""
    if file.is_symlink():
        path.symlink_to(file.readlink())
    else:
        link_or_copy(file, path)


def _check_converted(folder: Path, converted: Sequence[Path], files: Mapping[str, str]) -> None:
    """Raise UserError if the script that made GGUF of a base says that it was another one, or another type."""
    script = folder / CONVERT
    before = _converted_of(script.read_text(encoding="utf-8")) if script.is_file() else None
    now = _converted_of(files[CONVERT])
    if before not in (None, now):
        raise UserError(
            f"The base as GGUF is of another base or type than these adapters': {before}, and not {now}.",
            where=", ".join(map(str, converted)),
            fix=f"Remove what was converted, write the files again, and convert anew: sh {CONVERT}.",
        )


def _converted_of(script: str) -> str | None:
    """What a script makes GGUF of; None where it does not say so, as those of earlier releases."""
    return next((line.removeprefix(OF) for line in script.splitlines() if line.startswith(OF)), None)


def _served(exports: Exports, name: str, place: Place) -> Served:
    adapters = exports.loras if place.form == "lora" else exports.ggufs
    if not adapters:
        merged = ", ".join(path.name for path in exports.merged)
        raise UserError(
            f"{place.title} is told of adapters (NAME-{place.form}), and there are none.",
            where=str(exports.folder) + (f": {merged}" if merged else ""),
            fix=f"Export them: qmixlora export RUN --all --as {place.form}."
            + (" A merged checkpoint needs no files: it is served as any other model." if merged else ""),
        )
    _refuse_what_is_lost(adapters, place)
    bases = sorted({adapter.base for adapter in adapters}, key=str)
    if len(bases) > 1:
        on = "; ".join(f"{adapter.name} on {adapter.base}" for adapter in adapters)
        raise UserError("A server has one base, and these adapters lie on several.", where=on, fix="Export them again.")
    dtypes = [adapter.dtype for adapter in adapters if adapter.dtype is not None]
    typed = replace(bases[0], model=_typed(bases[0].model, exports.folder))
    return Served(adapters, typed, exports.folder, f"serve-{name}", dtypes[0] if dtypes else None)


def _refuse_what_is_lost(adapters: Sequence[Adapter], place: Place) -> None:
    """Raise UserError where a projector is in the adapters: refused by servers, or left out in silence."""
    whole = [adapter for adapter in adapters if adapter.whole_modules or adapter.projector == "adapter"]
    in_part = [adapter for adapter in adapters if adapter.projector == "low-rank"]
    for unfit, why in ((whole, "whole modules (modules_to_save)"), (in_part, "the projector as low-rank factors")):
        if unfit:
            raise UserError(
                f"{place.title} does not take, or leaves out in silence, {why} in an adapter.",
                where=", ".join(adapter.folder.name for adapter in unfit),
                fix="Put the projector into a base of its own: qmixlora export RUN --all --projector base.",
            )


def _typed(base: str, folder: Path) -> str:
    """A base as it is typed in the folder: a name beside the adapters, else a path from the root, else the hub's."""
    path = Path(base)
    if not path.is_dir():
        return base
    return path.name if path.resolve().parent == folder.resolve() else str(path.resolve())


def _request(place: Place, served: Served, adapter: Adapter) -> dict[str, Any]:
    """What requests for a task say beside its messages."""
    request = place.request(served, adapter)
    if adapter.template_arguments:
        request["chat_template_kwargs"] = dict(adapter.template_arguments)
    if adapter.stops and place.form == "lora":  # llama-server and Ollama are told when they start
        request["stop_token_ids"] = list(adapter.stops)
    return request


def _script(place: Place, served: Served) -> str:
    """A shell script, from any folder: the server's command over several lines, or commands of a line each."""
    lines = [shlex.join(line) for line in place.start(served)]
    head = '#!/bin/sh\ncd "$(dirname "$0")/.." || exit 1\n' + place.before(served)
    if place.image is None:
        return head + "\n".join(lines) + "\n"
    return (
        head + "# further options of the server: sh start.sh --OPTION VALUE\nexec " + " \\\n  ".join(lines) + ' "$@"\n'
    )


def _compose(served: Served, name: str, place: Place) -> str:
    """The same script in a container, with the card."""
    volumes = [f"..:{MOUNTED}:ro"]
    model = served.base.model
    if Path(model).is_absolute():
        volumes.append(f"{model}:{model}:ro")
    elif not (served.folder / model).is_dir():
        volumes.append("${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface")
    service = {
        "image": place.image,
        "entrypoint": ["sh", f"{MOUNTED}/{served.own}/{START}", "--host", "0.0.0.0"],
        "environment": dict(place.environment),
        "volumes": volumes,
        "ports": [f"127.0.0.1:{place.port}:{place.port}"],
        "ipc": "host",
        "deploy": GPU,
    }
    kept = {key: value for key, value in service.items() if value}
    return yaml.safe_dump({"services": {name: kept}}, sort_keys=False, width=110)


def _readme(exports: Exports, served: Served, place: Place) -> str:
    start = f"Start it: `sh {START}`, or `docker compose up` here."
    start = start if place.image else f"While it runs, tell it of the tasks: `sh {START}`."
    notes = dict.fromkeys(note for adapter in served.adapters for note in adapter.notes)
    if served.base.trust_remote_code and place.form == "lora":
        notes[CODE.format(model=served.base)] = None
    merged = [path.name for path in exports.merged]
    if merged:
        notes[f"Not served here, as each is a model of its own: {', '.join(merged)}."] = None
    asked = [f"python ask.py {shlex.quote(one.name)} {shlex.quote(_question(one))}" for one in served.adapters]
    checks = [
        typed("check", f"../{one.folder.name}", place.check, f"http://127.0.0.1:{place.port}") + _called(place, one)
        for one in served.adapters
    ]
    parts = [
        f"# These exports in {place.title}\n\n{place.about.format(base=served.alone)}",
        f"{start} {place.measured}",
        "Ask a task of it (a question, then any image files):\n\n" + _block(asked),
        "See that every task's adapter is applied:\n\n" + _block(checks),
        *notes,
    ]
    return "\n\n".join(parts) + "\n"


def _block(lines: Sequence[str]) -> str:
    return "```bash\n" + "\n".join(lines) + "\n```"


def _called(place: Place, adapter: Adapter) -> str:
    """`--name`, where a server calls a task otherwise than its fingerprint does."""
    own = place.named(adapter.name) + place.suffix
    known = adapter.fingerprint.name if adapter.fingerprint is not None else ""
    return "" if own == known else f" --name {shlex.quote(own)}"


def _question(adapter: Adapter) -> str:
    """A question of the fingerprint's, by preference one about no image."""
    prompts = [] if adapter.fingerprint is None else sorted(adapter.fingerprint.prompts, key=lambda one: one.has_image)
    return next((text for prompt in prompts if (text := _words(prompt))), "What can you do?")


def _words(prompt: Prompt) -> str:
    content = prompt.messages[-1]["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return " ".join(" ".join(texts).split())
