"""The words behind a verb: `~` in them, and overrides of a recipe's keys where it takes none."""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path
from typing import Any

from typer import Context
from typer.core import TyperCommand

from qmixlora.errors import UserError
from qmixlora.recipe import Recipe

OVERRIDE = re.compile(rf"(?:{'|'.join(Recipe.model_fields)})\.([\w.]+)=")


class Verb(TyperCommand):
    """A verb. Raises UserError for an override where it takes none: beyond its arguments, or as one."""

    HOME = re.compile(r"(--[\w-]+=)(~.*)", re.DOTALL)  # shells read `~` at the beginning of a word

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override, unused-ignore]
        """Read the words behind the verb, `--out=~/run` too."""
        args = [self.HOME.sub(lambda word: word[1] + expanduser(word[2]), word) for word in args]  # noqa: PTH111
        if not any(param.name == "overrides" for param in self.params):
            values, beyond, _ = self.make_parser(ctx).parse_args(args=list(args))
            own = [values.get(str(param.name)) for param in self.params if param.param_type_name == "argument"]
            words = [word for one in (beyond, *own) for word in (one if isinstance(one, list | tuple) else [one])]
            self._refuse(ctx, words)
        return super().parse_args(ctx, args)

    def _refuse(self, ctx: Context, words: list[Any]) -> None:
        for word in words:
            if (found := OVERRIDE.match(str(word))) and not Path(word).exists():
                flags = {flag for param in self.params for flag in param.opts}
                flag = "--" + found[1].replace("_", "-")
                own = f"Use {flag}: it is this command's own. " if flag in flags else ""
                raise UserError(
                    f"`{ctx.command_path}` takes no overrides of a recipe's keys.",
                    where=str(word),
                    fix=f"{own}A recipe's keys are set before training: in its file, or behind `qmixlora train`.",
                )
