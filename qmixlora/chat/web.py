"""A page to talk to a run on, its answers beside those of its backbone and of its exports; on this machine alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported: it would ask the network

import gradio as gr

from qmixlora.data import words
from qmixlora.errors import UserError

from .dialogue import Dialogue
from .lines import NO_IMAGE, NOTHING, SHOWN
from .speakers import Speakers, factors_at_work

HOST = "127.0.0.1"
COLUMN = 280  # pixels, at least, of what stands beside something else: a phone shows one column


@dataclass
class Visit:
    """What a visitor has talked about with each model so far."""

    image: str | None = None
    dialogues: dict[str, Dialogue] = field(default_factory=dict)


class Page:
    """The page of a folder: its parts, and what happens on it. A question is answered by one model after the other."""

    def __init__(self, folder: Path, image: Path | None, task: str | None) -> None:
        self.speakers = Speakers(folder)
        names, mixture = self.speakers.names, self.speakers.mixture
        routes_on_task = mixture is not None and mixture.route_on == "task"
        with gr.Blocks(title=f"qmixlora chat: {folder}", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# {folder}")
            with gr.Row():
                with gr.Column(scale=1, min_width=COLUMN):
                    self.image = gr.Image(
                        image and str(image.resolve()), label="Image", type="filepath", image_mode=None,
                        sources=["upload", "clipboard"], height=280,
                    )  # fmt: skip
                    self.names = gr.Dropdown(names, value=names[:2], multiselect=True, label="Who answers")
                    self.task = gr.Textbox(task, label="Task", visible=routes_on_task or task is not None)
                    self.question = gr.Textbox(label="Question", autofocus=True)
                    ask = gr.Button("Ask", variant="primary")
                    with gr.Row(equal_height=True):
                        stop, new = gr.Button("Stop", min_width=0), gr.Button("New conversation", min_width=0)
                with gr.Column(scale=3, min_width=COLUMN):
                    with gr.Row():
                        self.chats = {name: _chat(name, shown=name in names[:2]) for name in names}
                    self.factors = gr.Label(
                        label="Factors of pool A at work, last question", num_top_classes=SHOWN, show_heading=False,
                        visible=mixture is not None,
                    )  # fmt: skip
            self.visit = gr.State(Visit())
            self._connect(ask, stop, new)

    def _connect(self, ask: Any, stop: Any, new: Any) -> None:
        asked = gr.on(
            [ask.click, self.question.submit], self.ask,
            [self.question, self.image, self.task, self.names, self.visit],
            [self.question, self.visit, self.factors, *self.chats.values()],
            api_name="ask", show_progress="minimal",
        )  # fmt: skip
        self.names.change(
            lambda names: {chat: gr.update(visible=name in names) for name, chat in self.chats.items()},
            self.names, list(self.chats.values()), api_visibility="private",
        )  # fmt: skip
        for name, chat in self.chats.items():
            chat.clear(partial(self.forget, name), self.visit, self.visit, api_visibility="private")
        stop.click(None, cancels=[asked], api_visibility="private")
        gr.on(
            [new.click, self.image.input], self.begin_anew, self.image,
            [self.visit, self.factors, *self.chats.values()],
            api_name="new", cancels=[asked],
        )  # fmt: skip

    def ask(
        self, question: str, image: str | None, task: str | None, names: list[str], visit: Visit
    ) -> Iterator[dict[Any, Any]]:
        """Have a question answered; yields what changes on the page."""
        if not (question := question.strip()):
            return
        if not names:
            raise gr.Error("Choose who answers.", print_exception=False)
        if image != visit.image:
            visit = Visit(image)
        with _shown_errors():
            for name in names:
                visit.dialogues.setdefault(name, self._dialogue(image)).task = task or ""
            if image is None:
                gr.Info(NO_IMAGE.format(how="").strip("()"))
            changed: dict[Any, Any] = {self.question: "", self.visit: visit}
            for name in names:
                for change in self._answer(name, visit.dialogues[name], question):
                    changed |= change
                    yield changed

    def _dialogue(self, image: str | None) -> Dialogue:
        return Dialogue(Path(image) if image else None, None, self.speakers.recipe.data.max_pixels)

    def _answer(self, name: str, dialogue: Dialogue, question: str) -> Iterator[dict[Any, Any]]:
        chat, said = self.chats[name], [*_messages(dialogue), {"role": "user", "content": question}]
        yield {chat: said}
        with self.speakers.speaking(name) as session:
            for text in as_it_grows(partial(dialogue.ask, session, question)):
                yield {chat: [*said, {"role": "assistant", "content": text}]}
            at_work = factors_at_work(session)
        yield {chat: _messages(dialogue)}
        if at_work:
            shares = {f"factor {factor}": share for factor, share in at_work[0].items()}
            yield {self.factors: shares}

    def forget(self, name: str, visit: Visit) -> Visit:
        """Forget what was said to one model."""
        visit.dialogues.pop(name, None)
        return visit

    def begin_anew(self, image: str | None) -> dict[Any, Any]:
        """Forget what was said."""
        emptied: dict[Any, Any] = {chat: [] for chat in self.chats.values()}
        return {self.visit: Visit(image), self.factors: None, **emptied}


def _chat(name: str, *, shown: bool) -> Any:
    return gr.Chatbot(label=name, visible=shown, min_width=COLUMN, height=360, buttons=[])


def serve(folder: Path, image: Path | None, task: str | None, say: Callable[[str], None]) -> None:
    """Serve the page of a folder until a signal ends it; `say` is told its address.

    Raises UserError as `Speakers`, or if no port is free.
    """
    page = Page(folder, image, task).blocks
    page.queue(default_concurrency_limit=1)
    try:
        _, address, _ = page.launch(
            server_name=HOST, share=False, prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False,
            footer_links=[], theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"The page cannot be served: {error}", where=HOST, fix="Name a free port: GRADIO_SERVER_PORT=7960."
        ) from None
    try:
        say(f"{folder} answers at {address} on this machine, until Ctrl-C.")
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def as_it_grows(ask: Callable[[Callable[[str], None]], str]) -> Iterator[str]:
    """An answer so far, whenever its next part is there, from a function that tells the parts; closed, it ends the
    function at its next part.
    """
    parts: SimpleQueue[str | None] = SimpleQueue()
    left = Event()

    def tell(part: str) -> None:
        if left.is_set():
            raise InterruptedError("nobody listens")
        parts.put(part)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, tell)
        answer.add_done_callback(lambda done: parts.put(None))
        said = ""
        try:
            while (part := parts.get()) is not None:
                yield (said := said + part)
            answer.result()
        finally:
            left.set()


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    """What was said, as gradio shows it."""
    texts = [(turn["role"], words(turn["text"])) for turn in dialogue.turns]
    return [{"role": role, "content": text or NOTHING} for role, text in texts]


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Show mistakes of the user on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
