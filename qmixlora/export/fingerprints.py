"""Last pass of an export: the fingerprints of what was written, by stock libraries on the weights as served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from qmixlora.data import Conversation, open_images
from qmixlora.data.rendering.template import ChatTemplate
from qmixlora.manifest import add
from qmixlora.serving import making
from qmixlora.serving.fingerprint import BASE, EXPORT, FINGERPRINT, NO_PROJECTOR, ORIGINAL, Answer, Fingerprint, Message
from qmixlora.serving.stock import StockModel, load_model, put_adapter, with_values, without_parts

from .adapters import Adapter
from .fidelity import Fidelity
from .job import Job
from .live import Live
from .static import Learned

ROWS, LARGEST = 3, 672  # held-out rows in a fingerprint; pixels along an image's edge
SKIPPED = "Not every export has a fingerprint to check servers by: {reason}"


@dataclass(frozen=True)
class Asked:
    """The prompts of a target, and the answers of the models without its adapter."""

    prompts: list[list[Message]]
    answers: dict[str, list[Answer]]


def write_fingerprints(
    job: Job,
    learned: Learned,
    live: Sequence[Live],
    base: Path | None,
    adapters: Sequence[Adapter],
    made: Sequence[Fidelity],
) -> None:
    """Write `fingerprint.json` into the folder of every export, and of the base.

    An export stays if stock libraries cannot load or ask its model; it is told, then.
    """
    if not job.request.fingerprint:
        return
    job.say("fingerprints: what the exports answer")
    ready: list[tuple[Path, Fingerprint]] = []
    try:
        ready.extend(_fingerprints(job, learned, live, base, adapters, made))
    except Exception as error:  # of any model's own code, on any machine: the exports are whole and measured
        job.say(SKIPPED.format(reason=f"{type(error).__name__}: {error}"))
    for folder, fingerprint in ready:
        fingerprint.write(folder)
        add(folder, [FINGERPRINT])


def _fingerprints(
    job: Job,
    learned: Learned,
    live: Sequence[Live],
    base: Path | None,
    adapters: Sequence[Adapter],
    made: Sequence[Fidelity],
) -> Iterator[tuple[Path, Fingerprint]]:
    longest = job.longest_fingerprint
    stock = _load(job, base)
    originals = {} if base is None else learned.originals
    asked = {one.target.name: _ask_without(job, stock, one, originals) for one in live}
    if base is not None and not (base / FINGERPRINT).is_file():
        first = asked[live[0].target.name]
        yield _made(job, base, first, {EXPORT: first.answers[BASE], BASE: first.answers[ORIGINAL]})
    by_folder = {job.folder_of(one.target, form): one.target.name for one in live for form in job.request.forms}
    for adapter in adapters:
        name = adapter.live.target.name
        folders = [one.folder for one in made if one.form != "merged" and by_folder[one.folder] == name]
        if not folders:
            continue
        own = asked[name]
        put_adapter(stock, adapter.folder)
        answers = {EXPORT: making.answers_of(stock, own.prompts, longest), **own.answers}
        if adapter.fidelity.projector is not None:
            with _without_projector(stock, learned, originals):
                answers[NO_PROJECTOR] = making.answers_of(stock, own.prompts, longest)
        for folder in folders:  # of other forms, the same adapter
            yield _made(job, folder, own, answers, {} if base else job.recipe.model.template_arguments)
    del stock
    for fidelity in (one for one in made if one.form == "merged"):
        clear_device_cache(garbage_collection=True)
        own = asked[by_folder[fidelity.folder]]
        without = own.answers.get(ORIGINAL, own.answers[BASE])
        merged = making.answers_of(_load(job, fidelity.folder), own.prompts, longest)
        yield _made(job, fidelity.folder, own, {EXPORT: merged, BASE: without})


def _load(job: Job, export: Path | None) -> StockModel:
    """The checkpoint in the folder of an export, whose files have the run's settings; else the run's model."""
    spec = job.recipe.model
    if export is not None:
        return load_model(export, spec.dtype, trust_remote_code=spec.trust_remote_code)
    return load_model(
        spec.id,
        spec.dtype,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        template_arguments=spec.template_arguments,
    )


def _ask_without(job: Job, stock: StockModel, live: Live, originals: Mapping[str, Tensor]) -> Asked:
    prompts, longest = _prompts(job, live), job.longest_fingerprint
    answers = {BASE: making.answers_of(stock, prompts, longest)}
    if originals:
        with with_values(stock, originals):
            answers[ORIGINAL] = making.answers_of(stock, prompts, longest)
    return Asked(prompts, answers)


def _without_projector(stock: StockModel, learned: Learned, originals: Mapping[str, Tensor]) -> Any:
    """The model as a server has it that leaves the projector out: untrained, with the adapter's other layers."""
    if originals:
        return with_values(stock, originals)
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    tuned = [name for name, module in stock.model.get_base_model().named_modules() if isinstance(module, kinds)]
    parts = [name for name in tuned if name not in learned.pools]
    return without_parts(stock, parts) if parts else nullcontext()


def _made(
    job: Job,
    folder: Path,
    asked: Asked,
    answers: Mapping[str, Sequence[Answer]],
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[Path, Fingerprint]:
    name, _, form = folder.name.rpartition("-")
    of = (name or form, form, job.recipe.model.dtype, job.longest_fingerprint)
    return folder, making.make_fingerprint(*of, asked.prompts, answers, template_arguments)


def _prompts(job: Job, live: Live) -> list[list[Message]]:
    """Questions of held-out rows about their images; the first one without any, and about a large image if the run
    limits them.
    """
    template = job.collator.template
    rows = [live.rows[index] for index in range(min(ROWS, len(live.rows)))]
    prompts = [as_asked(template, row, open_images(row["images"])) for row in rows]
    if rows[0]["images"]:
        prompts.append(as_asked(template, rows[0], []))
        if job.recipe.data.max_image_tokens is not None:
            images = [image.resize((LARGEST, LARGEST)) for image in open_images(rows[0]["images"])]
            prompts.append(as_asked(template, rows[0], images))
    return prompts


def as_asked(template: ChatTemplate, row: Conversation, images: Sequence[Any]) -> list[Message]:
    """A row up to its first answer, in OpenAI's protocol, with as many of its images as there are. A content is a list
    of parts, or a string where the chat template needs one.
    """
    turns = row["turns"]
    before = next(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    left = list(images)
    messages = []
    for message in template.messages(turns[:before]):
        if isinstance(message["content"], str):
            messages.append(message)
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
            elif left:
                image = left.pop(0)
                image.thumbnail((LARGEST, LARGEST))
                parts.append(making.image_part(image))
        messages.append({**message, "content": parts})
    return messages
