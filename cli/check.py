"""qmixlora check"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from qmixlora.errors import UserError, typed

from . import here
from .ending import say_next
from .output import print_json

if TYPE_CHECKING:
    from qmixlora.serving.check import Asked, Report
    from qmixlora.serving.fingerprint import Fingerprint


Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"] | None,
    typer.Option(help="Of the fingerprint that is made (default: auto)."),
]
Tolerance = Annotated[
    float | None, typer.Option(min=0, help="Mean difference of log-probabilities (default: by the dtype).")
]


def check(
    export: Annotated[Path | None, typer.Argument(help="The folder of an export.")] = None,
    url: Annotated[str | None, typer.Option(help="A server of OpenAI's protocol (vLLM, SGLang).")] = None,
    llama_server: Annotated[str | None, typer.Option(help="A llama-server.")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="Stock PEFT, here: the adapter on its base.")] = False,
    transformers: Annotated[bool, typer.Option("--transformers", help="Stock transformers, here.")] = False,
    name: Annotated[str | None, typer.Option(help="What the server calls it (default: as the export).")] = None,
    base: Annotated[str | None, typer.Option(help="The base of the adapter (default: its own).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Make a fingerprint of another tool's adapter.")] = None,
    dtype: Dtype = None,
    tolerance: Tolerance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Ask a server whether it applies an export: exit 0 if it does, 1 if it answers as anything else."""
    from .quiet import quiet

    quiet()
    console = Console(stderr=as_json)
    if (export is None) == (adapter is None):
        raise UserError("Say which export: qmixlora check EXPORT, or --adapter DIR.", where="command line")
    here.not_both({"--url": url, "--llama-server": llama_server, "--peft": peft, "--transformers": transformers})
    is_served, takes_base = bool(url or llama_server), adapter is not None or not (url or llama_server or transformers)
    here.only_with("--url or --llama-server", is_served, {"--name": name})
    here.only_with("--adapter", adapter is not None, {"--dtype": dtype})
    here.only_with("--adapter or --peft", takes_base, {"--base": base})
    if adapter is not None:
        _make(adapter, base, dtype or "auto", console)
        if not (is_served or peft or transformers):
            say_next(console, "check", adapter, "--url", "URL", to="whether a server applies it")
            return
    from qmixlora.serving.check import check as run_check
    from qmixlora.serving.fingerprint import read_fingerprint

    export = export or adapter
    assert export is not None
    fingerprint = read_fingerprint(export)
    if (fingerprint.is_adapter and transformers) or (not fingerprint.is_adapter and peft):
        raise UserError(
            "An adapter is asked by --peft, a whole model by --transformers.", where=f"{export}: {fingerprint.form}"
        )
    report = run_check(fingerprint, _asked(export, fingerprint, url, llama_server, name, base), tolerance)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, console)
        if report.verdict == "applied" and not is_served:
            server = "--llama-server" if fingerprint.form == "gguf" else "--url"
            say_next(console, "check", export, server, "URL", to="whether a server applies it, too")
    raise typer.Exit(int(report.verdict != "applied"))


def _asked(
    export: Path,
    fingerprint: Fingerprint,
    url: str | None,
    llama_server: str | None,
    name: str | None,
    base: str | None,
) -> Asked:
    if url or llama_server:
        from qmixlora.serving import servers

        find = servers.openai_server if url else servers.llama_server
        return find(str(url or llama_server), fingerprint, str(export), name)
    if fingerprint.form == "gguf":
        raise UserError("This export is a file of llama.cpp.", where=str(export), fix="Ask its server: --llama-server.")
    from qmixlora.serving import local

    if not fingerprint.is_adapter:
        return local.with_transformers(export, fingerprint)
    return local.with_peft(export, fingerprint, base)


def _make(adapter: Path, base: str | None, dtype: str, console: Console) -> None:
    if base is None:
        raise UserError("Say what the adapter lies on: --base MODEL.", where="--adapter")
    from qmixlora.serving.fingerprint import FINGERPRINT
    from qmixlora.serving.making import fingerprint_adapter

    if (adapter / FINGERPRINT).exists():
        raise UserError(
            "The adapter has a fingerprint.",
            where=str(adapter / FINGERPRINT),
            fix=f"Check by it: {typed('check', adapter)}; or take it away to have another one made.",
        )
    fingerprint_adapter(adapter, base, dtype).write(adapter)
    console.print(f"Written: {adapter / FINGERPRINT}", markup=False, highlight=False, soft_wrap=True)


def _show(report: Report, console: Console) -> None:
    colour = "green" if report.verdict == "applied" else "bold red"
    console.print(f"[{colour}]{report.verdict}[/{colour}]")
    for line in (*report.reasons, *report.notes):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    from qmixlora.serving.check import NAMES

    for whose, one in report.found.items():
        by = f", log-probabilities {one.mean:.2g} apart, {one.largest:.2g} at most" if one.largest is not None else ""
        line = f"  {NAMES[whose]}: {one.same} of {one.prompts} answers the same{by}"
        console.print(line, highlight=False, soft_wrap=True)
