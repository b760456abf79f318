"""The recipe: everything a run depends on, typed and strict. No torch here, so that the command line stays fast.

A YAML file is parsed, overrides are put in by dotted path, and every mistake (unknown key, wrong type, values that do
not go together) is reported at once, each with its path.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError

EMBEDDED = "embedded"  # the value of model.id and data.train that stands for the demo's own backbone and data


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Section):
    """The frozen backbone."""

    id: str = Field(description="hub id, local folder, or 'embedded' for the demo's own backbone")
    revision: str | None = Field(default=None, description="hub revision: a branch, tag or commit")
    quantization: Literal["nf4", "none"] = Field(default="nf4", description="nf4: 4-bit NF4 with double quantisation")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="compute dtype, and the dtype of everything that is not quantised"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")


class Adapter(_Section):
    """The trainable part."""

    method: Literal["mixlora", "lora"] = Field(default="mixlora", description="lora: plain PEFT LoRA, the baseline")
    num_factors: int = Field(default=16, ge=1, description="E, factors in each pool (mixlora)")
    r: int = Field(default=4, ge=1, description="R, factors active for an instance; the rank (lora)")
    alpha: float = Field(default=8.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(default=0.05, ge=0, lt=1)
    pairing: Literal["conditional", "released", "independent", "tied"] = "tied"
    gate: Literal["hard", "straight_through", "weighted", "dense"] = "weighted"
    route_on: Literal["all", "prompt", "instruction", "embedding", "task"] = "embedding"
    condition_norm: Literal["none", "center"] = Field(
        default="center", description="center: routed on without what all inputs share (their running mean)"
    )
    task_mix: float = Field(default=0.0, ge=0, le=1, description="share of samples gated by their task's mean")
    target_modules: Literal["language"] | list[str] = Field(
        default="language", description="'language': every linear layer of the decoder; or suffixes of their names"
    )
    train_projector: bool = Field(default=True, description="train the projector too, whole and in fp32")


class Data(_Section):
    """Conversations with pictures, in LLaVA / Vision-Flan JSON or chat `messages`."""

    train: str = Field(description="file (json, jsonl, parquet), a data set of `datasets`, or 'embedded'")
    validation: str | None = None
    test: str | None = None
    image_root: str | None = Field(default=None, description="folder that image paths start from (default: the file's)")
    task_field: str | None = Field(default=None, description="field with the task's name (default: task or task_name)")
    max_length: int = Field(default=2048, ge=8, description="longest sample in tokens, images included; never cut")
    num_workers: int = Field(default=0, ge=0)


class Checkpointing(_Section):
    """Activation checkpointing (always non-reentrant)."""

    enabled: bool = True
    every_n_layers: int = Field(default=1, ge=1)
    offload: bool = Field(default=False, description="keep what is saved in host memory")


class Train(_Section):
    """The run."""

    output: str = Field(default="runs/latest", description="the run's folder")
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; overrules epochs")
    micro_batch_size: int = Field(default=1, ge=1, description="samples at a time on the device")
    gradient_accumulation: int = Field(default=16, ge=1, description="micro-batches per optimiser step")
    eval_batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    checkpointing: Checkpointing = Checkpointing()
    seed: int = 0
    log_every: int = Field(default=10, ge=1, description="optimiser steps")
    eval_every: int | None = Field(default=None, ge=1, description="optimiser steps (default: each epoch)")
    save_every: int | None = Field(default=500, ge=1, description="optimiser steps (null: no checkpoints)")
    keep_checkpoints: int = Field(default=2, ge=1)
    max_new_tokens: int = Field(default=32, ge=1, description="longest answer when evaluating by generation")


class Export(_Section):
    """What becomes of the run."""

    polish: int = Field(
        default=200, ge=0, description="further steps for a task whose static adapter is worse than the live mixture"
    )
    samples: int = Field(default=256, ge=1, description="held-out samples per task that an export is measured on")


class Recipe(_Section):
    """One run of qmixlora."""

    model: Model
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    export: Export = Export()

    def with_absolute_paths(self) -> Recipe:
        """The same with local files named from the root, so that the run can be used from any folder."""
        paths = {name: _absolute(getattr(self.data, name)) for name in ("train", "validation", "test", "image_root")}
        model = self.model.model_copy(update={"id": _absolute(self.model.id)})
        return self.model_copy(update={"model": model, "data": self.data.model_copy(update=paths)})

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def _absolute(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def json_schema() -> dict[str, Any]:
    """JSON schema of the recipe, for editors (`# yaml-language-server: $schema=...`)."""
    return Recipe.model_json_schema()


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file or a shipped recipe, put in overrides (`train.learning_rate=1e-3`), and validate.

    Raises:
        UserError: no such recipe, broken YAML, or anything wrong in it; every mistake is listed with its path.
    """
    text, where = read_recipe(name_or_path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"This is not YAML: {getattr(error, 'problem', error)}", where=where + line) from None
    if not isinstance(values, dict):
        raise UserError("A recipe is a mapping with the sections model, adapter, data and train.", where=where)
    for override in overrides:
        _override(values, override)
    return validate(values, where)


def read_recipe(name_or_path: str) -> tuple[str, str]:
    """(text, where it came from) of a recipe file, or of a shipped recipe by its name."""
    path = Path(name_or_path)
    try:
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the recipe: {error}", where=str(path), fix="Check the path.") from None
    shipped = shipped_recipes()
    if name_or_path not in shipped:
        raise UserError(
            f"There is no recipe {name_or_path!r}.{_did_you_mean(name_or_path, shipped)}",
            where="shipped recipes: " + ", ".join(shipped),
            fix="Name one of them, or the path of a .yaml file.",
        )
    return shipped[name_or_path], f"shipped recipe {name_or_path}"


def shipped_recipes() -> dict[str, str]:
    """Name and bare YAML of every shipped recipe, sorted by name."""
    files = resources.files("qmixlora.recipes").iterdir()
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def validate(values: dict[str, Any], where: str) -> Recipe:
    """The recipe that these values describe. Raises UserError with every mistake in them."""
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        problems += [_explain(item, values) for item in errors]
        # look at the rest as well: with the bad entries out of the way, values that do not go together show too
        rest = json.loads(json.dumps(values, default=str))
        for item in errors:
            if item["type"] != "missing":
                _drop(rest, item["loc"])
        for section, key in (("model", "id"), ("data", "train")):
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
    """Values that are right alone and wrong together."""
    adapter, problems = recipe.adapter, []
    if adapter.method == "mixlora":
        if adapter.r > adapter.num_factors:
            problems.append(f"adapter.r: {adapter.r} is more than adapter.num_factors, {adapter.num_factors}")
        if adapter.gate == "weighted" and adapter.r == 1:
            problems.append("adapter.gate: weighted needs adapter.r >= 2 (one weight of mean 1 teaches nothing)")
    elif adapter.task_mix > 0:
        problems.append("adapter.task_mix: plain lora has no gates to replace; leave it 0")
    if recipe.train.checkpointing.offload and not recipe.train.checkpointing.enabled:
        problems.append("train.checkpointing.offload: there is nothing to offload while enabled is false")
    if recipe.train.eval_every and not recipe.data.validation and recipe.data.train != EMBEDDED:
        problems.append("train.eval_every: there is nothing to evaluate on; set data.validation")
    return problems


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"An override has the form section.key=value, not {override!r}.", where="command line")
    *sections, key = path.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"{section!r} is a value, not a section.", where=f"override {override!r}")
    try:
        target[key] = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not a YAML value.", where=f"override {override!r}", fix="Quote it.") from None


def _explain(item: Any, values: dict[str, Any]) -> str:
    """One pydantic error in the user's words."""
    loc = [part for part in item["loc"] if not (isinstance(part, str) and "[" in part)]
    path = ".".join(str(part) for part in loc)
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key.{_did_you_mean(str(loc[-1]), _keys_at(loc[:-1]))}"
    if item["type"] == "missing":
        return f"{path}: missing"
    got = item.get("input")
    quote = " (YAML reads on, off, yes and no as booleans: quote the word)" if isinstance(got, bool) else ""
    return f"{path}: {item['msg'].lower()}, got {got!r}{quote}"


def _keys_at(loc: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in loc:
        field = section.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return []
        section = field.annotation
    return list(section.model_fields)


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


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
