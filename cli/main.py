"""Wiring: the verbs, and the look of an error. Nothing heavy is imported here."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import NoReturn

import typer

from qmixlora.errors import UserError
from qmixlora.files import unusable
from qmixlora.interrupts import Interrupted, raised

from . import (
    chat,
    check,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    new,
    pick,
    plan,
    recipes,
    report,
    route,
    serve_files,
    train,
)
from .output import guarded, outlast
from .overrides import Verb

FIRST_STEPS = """qmixlora fine-tunes multimodal LLMs on one consumer GPU.

  qmixlora doctor                       what this machine has, and lacks
  qmixlora demo                         the whole way on an embedded toy, on a CPU too
  qmixlora new --model M --data D       a recipe for your model, data and card
  qmixlora recipes list --vram 12       recipes that fit a card of 12 GB
  qmixlora recipes copy NAME my.yaml    yours to edit: set data.train
  qmixlora data my.yaml                 what your data holds, and what is wrong in it
  qmixlora plan my.yaml                 whether it fits, and what to change
  qmixlora train my.yaml                the run; --resume goes on with it
  qmixlora eval RUN                     scores by task, on the test split
  qmixlora compare RUN RUN              what is better, and whether it is a difference
  qmixlora report RUN                   a page: curves, scores, answers, routing, exports
  qmixlora chat RUN --image FILE        ask it; --web: on a page
  qmixlora export RUN --all --as lora   ordinary adapters (or checkpoints: --as merged)
  qmixlora serve-files RUN --for vllm   what one types to serve them
  qmixlora check EXPORT --url URL       whether a server really applies it
  qmixlora route RUN "INSTRUCTION"      the scales to ask llama-server with, of a live mixture
  qmixlora pick RUN "instruction"       which export, where a server takes one per request

`qmixlora COMMAND --help` says more.
"""

WORK = ("demo", "train", "eval", "export")  # verbs whose work is worth more than what they print

app = typer.Typer(
    name="qmixlora",
    help="Fine-tune multimodal LLMs on one consumer GPU: NF4 backbone, Conditional Mixture-of-LoRA adapters.",
    pretty_exceptions_enable=False,
)
# on the way out nothing is searched for garbage: among all that torch has made, that would take two seconds
atexit.register(gc.freeze)

app.command("demo", cls=Verb)(demo.demo)
app.command("train", cls=Verb)(train.train)
app.command("eval", cls=Verb)(evaluate.evaluate)
app.command("compare", cls=Verb)(compare.compare)
app.command("export", cls=Verb)(export.export)
app.command("report", cls=Verb)(report.report)
app.command("serve-files", cls=Verb)(serve_files.serve_files)
app.command("check", cls=Verb)(check.check)
app.command("route", cls=Verb)(route.route)
app.command("pick", cls=Verb)(pick.pick)
app.command("new", cls=Verb)(new.new)
app.command("plan", cls=Verb)(plan.plan)
app.command("data", cls=Verb)(data.data)
app.command("inspect", cls=Verb)(inspect.inspect)
app.command("chat", cls=Verb)(chat.chat)
app.command("doctor", cls=Verb)(doctor.doctor)
app.add_typer(recipes.app, name="recipes")


@app.callback(invoke_without_command=True)
def first_steps(context: typer.Context) -> None:
    if context.invoked_subcommand in WORK:
        outlast()
    if context.invoked_subcommand is None:
        print(FIRST_STEPS, end="")


def run() -> None:
    """The `qmixlora` command. Exits 0 when done, 1 when a check failed, 2 for the user's mistake, 74 when all is done
    but nothing could be printed, 128 and the number of a signal that ended it, and 141 where a listing's reader left.
    """
    with raised(), guarded():
        try:
            app()
        except (UserError, Interrupted) as end:
            _end(end)
        except OSError as error:
            if (told := unusable(error)) is None:
                raise
            _end(told)
        except (RuntimeError, MemoryError) as error:
            from qmixlora.out_of_memory import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            _end(
                UserError(
                    f"Memory ran out: {str(error).partition('. ')[0].rstrip('.') or type(error).__name__}.",
                    fix="Close what else uses the card, or the host's memory; answers are made train.eval_batch_size "
                    "at a time, which can be 1; `qmixlora plan` says what a run takes.",
                )
            )


def _end(end: UserError | Interrupted) -> NoReturn:
    print(f"qmixlora: {end}", file=sys.stderr)
    raise SystemExit(end.exit_code) from None


if __name__ == "__main__":  # `accelerate launch -m qmixlora.cli.main`
    run()
