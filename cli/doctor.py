"""qmixlora doctor"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    model: Annotated[str | None, typer.Option(help="Look at a model instead: a folder, or an id on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Examine this machine, or the parts of a model: what there is, and what to do about what is lacking."""
    from .quiet import quiet

    quiet()
    if model is not None:
        _look_at(model, as_json)
        return
    from qmixlora.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'lack'}  {finding.what}: {finding.found}")
            if not finding.ok:
                print(f"      {finding.advice}")
    raise SystemExit(int(not all(finding.ok for finding in findings)))


def _look_at(model: str, as_json: bool) -> None:
    from dataclasses import asdict

    from qmixlora.backbone import parts_of
    from qmixlora.recipe import Model

    parts = parts_of(Model(id=model))
    if as_json:
        print(json.dumps({**asdict(parts), "neither": parts.shares.of_neither}, indent=2))
        return
    for what, found in parts.lines():
        print(f"{what}: {found}")
