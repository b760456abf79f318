"""qmixlora doctor"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False) -> None:
    """Examine this machine: what it has, and what to do about what it lacks."""
    from .quiet import quiet

    quiet()
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
