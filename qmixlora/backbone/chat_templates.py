"""Whether a model's processor has one chat template, and what to do where it has none, or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from qmixlora.errors import UserError

TEMPLATE = "chat_template.jinja"
DEFAULT = "default"
COPY = (  # the template is read before the file is opened
    'python -c "from pathlib import Path; from transformers import AutoTokenizer; '
    "Path('{folder}/{file}').write_text(AutoTokenizer.from_pretrained('{folder}').chat_template, encoding='utf-8')\""
)


def take_default(processor: ProcessorMixin) -> None:
    """Leave a processor of several chat templates the one that stock libraries take where none is named."""
    templates = getattr(processor, "chat_template", None)
    if isinstance(templates, dict) and DEFAULT in templates:
        processor.chat_template = templates[DEFAULT]


def check_template(processor: ProcessorMixin, model: str) -> None:
    """Raise UserError if the processor of a model, an id or a folder, has no chat template, or several of which none is
    the default.
    """
    template, where = getattr(processor, "chat_template", None), f"model.id: {model}"
    if isinstance(template, dict):
        raise UserError(
            f"The model's processor has several chat templates, none of which is called default: "
            f"{', '.join(sorted(template))}.",
            where=where,
            fix=f"Save the one to use as {TEMPLATE} in a local copy of the model, in the place of "
            "additional_chat_templates.",
        )
    if template is not None:
        return
    if (Path(model) / TEMPLATE).is_file():
        raise UserError(
            f"{type(processor).__name__}, the class of the model's processor, reads no chat template, though there is "
            "one.",
            where=where,
            fix="Use a model whose processor has a chat template, such as llava-hf/llava-1.5-7b-hf.",
        )
    raise UserError("The model's processor has no chat template.", where=where, fix=_fix(processor, model))


def _fix(processor: ProcessorMixin, model: str) -> str:
    """What to do about a processor without a chat template, whose tokenizer may have one."""
    template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if not isinstance(template, str):
        return f"Use an instruction-tuned checkpoint, or add {TEMPLATE} to a local copy."
    if not _takes_images(processor, template):
        return f"Add a {TEMPLATE} to a local copy: its tokenizer has a chat template, but that has no place for images."
    folder = model if Path(model).is_dir() else "FOLDER"
    copy = COPY.format(folder=folder, file=TEMPLATE)
    return f"Its tokenizer has one, which takes images: write that into {TEMPLATE} of a local copy, by {copy}"


def _takes_images(processor: ProcessorMixin, template: str) -> bool:
    """Whether a chat template writes a placeholder of the processor for an image."""
    part: dict[str, Any] = {"type": "text", "text": "?"}
    texts = []
    for content in ([{"type": "image"}, part], [part]):
        try:
            messages: Any = [{"role": "user", "content": content}]
            texts.append(str(processor.apply_chat_template(messages, chat_template=template)))
        except Exception:  # jinja2's own, and whatever a template raises
            return False
    own = [text for name, text in vars(processor).items() if name.endswith("_token") and isinstance(text, str) and text]
    return any(texts[0].count(token) > texts[1].count(token) for token in own)
