"""Values to a recipe: every mistake (unknown key, wrong type, values that do not go together) is reported at once, each
with its path.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from qmixlora.errors import UserError, did_you_mean, without_secrets

from . import template
from .migration import migrate
from .schema import MADE_HERE, METRICS, OWN_INPUT, Columns, Data, Recipe
from .section import section_in
from .synonyms import meant_by


def validate(values: dict[str, Any], where: str) -> Recipe:
    """The recipe that these values describe (keys of earlier releases are renamed in them). Raises UserError with every
    mistake in them.
    """
    migrate(values)
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        errors = _of_the_meant_kind(error.errors())
        problems += [_explain(item, values) for item in errors]
        # look at the rest as well: with the bad entries out of the way, values that do not go together show too
        rest = json.loads(json.dumps(values, default=str))
        for item in errors:
            if item["type"] != "missing":
                _drop(rest, item["loc"])
        needed = [("model", "id"), ("data", "train")]
        needed += [("data", "validation")] if any(item["loc"][:2] == ("data", "validation") for item in errors) else []
        for section, key in needed:
            rest[section] = {key: "?", **(rest.get(section) or {})}
        with contextlib.suppress(ValidationError):
            problems += _conflicts(Recipe.model_validate(rest))
    else:
        problems += _conflicts(recipe)
    if problems or recipe is None:
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        lines = "".join(f"\n    {problem}" for problem in problems)
        raise UserError(f"The recipe has {count}:{lines}", where=where, fix="`qmixlora recipes schema` lists all keys.")
    return recipe


def _conflicts(recipe: Recipe) -> list[str]:
    """Name values that are right alone and wrong together."""
    adapter, problems = recipe.adapter, _secrets(recipe.model_dump())
    if adapter.method == "mixlora":
        if adapter.r > adapter.num_factors:
            most = f"set adapter.r={adapter.num_factors} adapter.alpha={2 * adapter.num_factors}"  # LoRA's usual scale
            problems.append(f"adapter.r: {adapter.r} is more than adapter.num_factors, {adapter.num_factors}; {most}")
        if adapter.gate == "weighted" and adapter.r == 1:
            problems.append("adapter.gate: weighted needs adapter.r >= 2 (one weight of mean 1 teaches nothing)")
        if adapter.router != "layer" and (adapter.route_on in OWN_INPUT or adapter.pairing != "tied"):
            problems.append(
                f"adapter.router: {adapter.router} needs adapter.route_on: embedding or task and adapter.pairing: "
                "tied (otherwise what is routed on, or the scores, are each layer's own)"
            )
    elif adapter.task_mix > 0:
        problems.append("adapter.task_mix: plain lora has no gates to replace; leave it 0")
    if recipe.train.checkpointing.offload and not recipe.train.checkpointing.enabled:
        problems.append("train.checkpointing.offload: there is nothing to offload while enabled is false")
    problems += _batch_conflicts(recipe)
    problems += _memory_conflicts(recipe) + _column_conflicts(recipe.data) + _part_conflicts(recipe.data)
    problems += _metric_problems(recipe.data) + _amount_problems(recipe.data)
    if not recipe.data.validation and recipe.data.train not in MADE_HERE:
        needing = [key for key in ("eval_every", "eval_generate", "early_stopping") if getattr(recipe.train, key)]
        problems += [f"train.{key}: there is nothing to evaluate on; set data.validation" for key in needing]
    return problems


def _batch_conflicts(recipe: Recipe) -> list[str]:
    """Name what contradicts micro-batches that are filled by tokens."""
    tokens, longest, problems = recipe.train.batch_tokens, recipe.data.max_length, []
    if tokens is None:
        return []
    if recipe.train.micro_batch_size != 1:
        problems.append(
            "train.batch_tokens: micro-batches are filled by tokens or by samples; leave micro_batch_size out"
        )
    if recipe.data.group_by_length:
        problems.append("train.batch_tokens: its micro-batches are by length anyway; leave data.group_by_length out")
    if tokens < longest:
        problems.append(f"train.batch_tokens: a sample may have {longest} tokens (data.max_length), more than {tokens}")
    return problems


def _metric_problems(data: Data) -> list[str]:
    problems = []
    for task, name in data.metrics.items():
        if ":" in name and not data.allow_code:
            problems.append(f"data.metrics.{task}: {name} is Python code; data.allow_code: true runs it")
        elif ":" not in name and name not in METRICS:
            known, meant = ", ".join(METRICS), did_you_mean(name, METRICS)
            problems.append(f"data.metrics.{task}: there is no metric {name!r}; one of {known}.{meant}")
    return problems


def _amount_problems(data: Data) -> list[str]:
    """Name what is neither a share of the training data nor a number of its rows."""
    problems = []
    for name in ("validation", "test"):
        amount = getattr(data, name)
        if isinstance(amount, float) and amount > 1 and amount % 1:
            problems.append(f"data.{name}: input should be a share below 1, or a whole number of rows, got {amount}")
        if isinstance(amount, str) and _is_number(amount):
            problems.append(
                f"data.{name}: {amount!r} is text in YAML, the name of a file; write a share as 0.1, so many rows as "
                f"100, and a file of that name as ./{amount}"
            )
    return problems


def _is_number(text: str) -> bool:
    """Whether a text is a number to a reader, such as 1e-1, 10% and 0,1."""
    try:
        return math.isfinite(float(text.strip().removesuffix("%").replace(",", ".")))
    except ValueError:
        return False


def _secrets(values: Any, path: str = "") -> list[str]:
    """Name texts that hold a token or a password, without them: recipes are copied into runs and exports."""
    if isinstance(values, dict):
        return [line for key, value in values.items() for line in _secrets(value, f"{path}.{key}".lstrip("."))]
    if isinstance(values, list):
        return [line for index, value in enumerate(values) for line in _secrets(value, f"{path}[{index}]")]
    if isinstance(values, str) and without_secrets(values) != values:
        return [f"{path}: a token or password has no place in a recipe, which runs copy; `hf auth login`, or HF_TOKEN"]
    return []


def _memory_conflicts(recipe: Recipe) -> list[str]:
    """Name memory levers that exclude each other."""
    model, train, problems = recipe.model, recipe.train, []
    if model.stream_layers in (1, 2):
        problems.append("model.stream_layers: its two buffers take as much as two layers; stream 3 or more, or none")
    if model.stream_layers:
        if model.quantization != "nf4":
            problems.append("model.stream_layers: only 4-bit layers are streamed; set model.quantization: nf4")
        if not (train.checkpointing.enabled and train.checkpointing.every_n_layers == 1):
            problems.append(
                "model.stream_layers: streamed layers are gone when the backward pass needs them; "
                "set train.checkpointing.enabled: true and every_n_layers: 1"
            )
    if model.offload_embeddings and model.quantize_embeddings != "none":
        problems.append("model.offload_embeddings: quantised embeddings stay on the card; choose one of the two")
    if train.mlp_chunk and recipe.adapter.method == "mixlora" and recipe.adapter.route_on in OWN_INPUT:
        problems.append(
            f"train.mlp_chunk: adapter.route_on: {recipe.adapter.route_on} needs a layer's input as a whole; "
            "route on the embedding or the task"
        )
    if train.cache_features and recipe.adapter.projector != "frozen":
        problems.append(
            "train.cache_features: features are what the projector makes of an image, and it is trained; "
            "set adapter.projector: frozen"
        )
    if train.cache_features and train.eval_generate:
        problems.append(
            "train.eval_generate: answers need the vision tower, which train.cache_features leaves out; "
            "choose one of the two, or stop early by validation loss (train.early_stopping alone)"
        )
    return problems


def _part_conflicts(data: Data) -> list[str]:
    """Name what is wrong in the parts of a mixture."""
    if isinstance(data.train, str):
        return []
    problems = [] if data.train else ["data.train: there is no source in the list"]
    for index, part in enumerate(data.train):
        where = f"data.train[{index}]"
        if part.path in MADE_HERE:
            problems.append(f"{where}.path: the {part.path} data comes alone")
        if part.weight is not None and part.samples is not None:
            problems.append(f"{where}: weight and samples say the same thing; give one of them")
        own = {name: value for name in ("columns", "template") if (value := getattr(part, name)) is not None}
        problems += [f"{where}: {problem}" for problem in _column_conflicts(data.model_copy(update=own))]
    return problems


def _column_conflicts(data: Data) -> list[str]:
    """Name what is wrong between a template and the columns that it uses."""
    columns = data.columns
    if columns is None:
        return ["data.template: there is nothing to put into it; set data.columns"] if data.template is not None else []
    problems = []
    if columns.task and data.task_field:
        problems.append("data.task_field: data.columns.task names the task; remove one of the two")
    needed = {*columns.texts(), *(["options"] if columns.options else [])}
    try:
        used = template.names(data.question_template())
    except ValueError as error:
        return [*problems, f"data.template: {error}"]
    for name in used:
        if name == "answer":
            problems.append("data.template: {answer} would show the answer in the question")
        elif name not in {*needed, "image", "task"} or (name in {"image", "task"} and not getattr(columns, name)):
            known = ", ".join(sorted(needed))
            meant = did_you_mean(name, needed)
            problems.append(f"data.template: {{{name}}} is not among data.columns, {known}.{meant}")
    for name in sorted(needed - {*used}):
        meant = did_you_mean(name, Columns.model_fields) if name not in Columns.model_fields else ""
        problems.append(f"data.columns.{name}: data.template does not use it.{meant}")
    return problems


def _explain(item: Any, values: dict[str, Any]) -> str:
    """Say one pydantic error in the user's words."""
    loc = [
        part
        for part in item["loc"]
        if not (isinstance(part, str) and ("[" in part or part in {"str", "constrained-float"}))
    ]
    path = ".".join(str(part) for part in loc)
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key.{_meant(str(loc[-1]), loc[:-1])}"
    if item["type"] == "missing":
        return f"{path}: missing"
    got = item.get("input")
    if item["type"] == "model_type":
        return f"{path}: a section with keys such as {', '.join(_keys_at(loc)[:3])}, got {got!r}"
    quote = "" if item["type"] in {"int_type", "float_type"} else ": quote the word"
    why = f" (YAML reads on, off, yes and no as booleans{quote})" if isinstance(got, bool) else ""
    return f"{path}: {item['msg'].lower()}, got {got!r}{why}"


def _meant(word: str, loc: Sequence[Any]) -> str:
    """A sentence that names the key that is meant: one that other tools call so, one of another section, or one of its
    own section that is spelt alike.
    """
    elsewhere = [f"{section}.{word}" for section in Recipe.model_fields if word in _keys_at([section])]
    found = meant_by(word) or (elsewhere[0] if elsewhere else None)
    return f" Did you mean {found}?" if found else did_you_mean(word, _keys_at(loc))


def _of_the_meant_kind(errors: Sequence[Any]) -> list[Any]:
    """The errors without those of a kind that a value was not meant to be: a list is no misspelt text, nor is a number
    where a number may stand.
    """
    numbers = {item["loc"][:-1] for item in errors if "float" in str(item["loc"][-1])}

    def is_meant(item: Any) -> bool:
        value = item.get("input")
        is_another = isinstance(value, list) or (isinstance(value, float | int) and item["loc"][:-1] in numbers)
        is_text = str(item["loc"][-1]).partition("[")[0] in {"str", "literal"}
        return not (is_text and is_another)

    return [item for item in errors if is_meant(item)]


def _keys_at(loc: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int):  # of a list, whose kind of items is known already
            continue
        field = section.model_fields.get(part)
        section = field and section_in(field.annotation)
        if section is None:
            return []
    return list(section.model_fields)


def _drop(values: Any, loc: Sequence[Any]) -> None:
    """Delete the entry at a path, as far as it leads."""
    for part in loc[:-1]:
        if not (isinstance(values, dict) and part in values):
            return
        if not isinstance(values[part], dict):
            break
        values = values[part]
    else:
        part = loc[-1]
    if isinstance(values, dict):
        values.pop(part, None)
