"""An adapter: its config for a model; its files, read, compared with the model they go onto, loaded key for key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .backbone import Anatomy
from .bases import ADAPTER_CONFIG as ADAPTER_CONFIG
from .bases import COPY, own_base
from .errors import UserError
from .files import clear_read_errors
from .mixlora import FORMAT, MixLoraConfig
from .mixlora.config import ends_in
from .recipe import Adapter, Model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# of a mixture: fields of its config, and keys of a recipe's adapter
SETTINGS = ("num_factors", "r", "alpha", "pairing", "gate", "route_on", "condition_norm", "router", "task_mix")
SAME_MODEL = "Use the backbone, the adapter's files and the library versions that belong together."
Shapes = Mapping[str, tuple[int, ...]]


def read_config(folder: Path) -> PeftConfig:
    """The PEFT config in an adapter's folder. Raises UserError if it is missing or broken, or of a later release."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise UserError("The adapter has no config.", where=str(file), fix=COPY)
    with clear_read_errors(file, COPY):
        version = json.loads(file.read_text(encoding="utf-8")).get("format_version")
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"The adapter is of a later release: its format is {version}, and this release knows {FORMAT}.",
                where=str(file),
                fix="Upgrade qmixlora.",
            )
        return cast(PeftConfig, PeftConfig.from_pretrained(str(folder)))


def check_same_settings(config: PeftConfig, adapter: Adapter, where: str) -> None:
    """Compare the config of a run's adapter with its recipe. Raises UserError with the first setting that differs."""
    if isinstance(config, MixLoraConfig):
        pairs = {name: (getattr(config, name), getattr(adapter, name)) for name in SETTINGS}
    elif isinstance(config, LoraConfig):
        pairs = {"r": (config.r, adapter.r), "alpha": (config.lora_alpha, adapter.alpha)}
    else:
        pairs = {}
    method = "mixlora" if isinstance(config, MixLoraConfig) else "lora"
    for name, (own, recipe) in {"method": (method, adapter.method), **pairs}.items():
        if own != recipe:
            raise UserError(
                f"The adapter's config and the run's recipe do not belong together: {name} is {own!r} and {recipe!r}.",
                where=where,
                fix=COPY,
            )


def model_below(folder: Path, spec: Model) -> Model:
    """The model that the adapter in a folder lies on: a base of its own, else the recipe's. Raises as `own_base`."""
    base = own_base(folder)
    return spec if base is None else spec.model_copy(update={"id": str(base), "revision": None, "learned_on": {}})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter. Raises UserError if the file is broken, or if one of them is not finite."""
    file = folder / ADAPTER_WEIGHTS
    with clear_read_errors(file, COPY):
        weights: dict[str, Tensor] = load_file(file)
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"The adapter has numbers that are not finite, in {name}.", where=str(file), fix=COPY)
    return weights


def load_adapter(model: PeftModel, weights: dict[str, Tensor], where: str) -> None:
    """Load adapter weights key for key. Raises UserError as `check_fit`."""
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
    set_peft_model_state_dict(model, dict(weights))


def check_fit_of_files(model: PeftModel, folder: Path) -> None:
    """Compare the adapter in a folder with a model, without reading its numbers. Raises UserError as `check_fit`, and
    for a broken file.
    """
    file = folder / ADAPTER_WEIGHTS
    with clear_read_errors(file, COPY), safe_open(file, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    check_fit(model, shapes, str(file))


def check_fit(model: PeftModel, shapes: Shapes, where: str) -> None:
    """Compare the tensors of an adapter with those that a model has. Raises UserError with the first difference."""
    expected: dict[str, Any] = get_peft_model_state_dict(model)
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    other = [name for name in expected if name in shapes and tuple(expected[name].shape) != shapes[name]]
    if other:
        first = f"{other[0]} is {_size(shapes[other[0]])} in the file, and {_size(expected[other[0]].shape)} here"
    elif missing:
        first = f"{missing[0]} is not in the file"
    elif extra:
        first = f"{extra[0]} has no place here"
    else:
        return
    raise UserError(
        f"The adapter does not fit the backbone: {first} ({len(missing)} tensors missing, {len(extra)} without a "
        f"place, {len(other)} of another shape).",
        where=where,
        fix=SAME_MODEL,
    )


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "a number"


def adapter_config(adapter: Adapter, anatomy: Anatomy, tasks: Sequence[str]) -> MixLoraConfig | LoraConfig:
    """The PEFT config that the recipe asks for, on this model. Raises UserError if a target matches no layer,
    or the projector has none for factors.
    """
    targets = list(anatomy.routable if adapter.method == "mixlora" else anatomy.adaptable)
    if adapter.target_modules != "language":
        for suffix in adapter.target_modules:
            if not any(ends_in(name, suffix) for name in targets):
                kinds = sorted({name.rpartition(".")[2] for name in targets})
                raise UserError(
                    f"No linear layer of the language model that can be adapted is called {suffix!r}.",
                    where="adapter.target_modules",
                    fix=f"Its layers are: {', '.join(kinds)}.",
                )
        targets = [name for name in targets if any(ends_in(name, suffix) for suffix in adapter.target_modules)]
    static = _projector_targets(anatomy) if adapter.projector == "lora" else []
    which: dict[str, Any] = {
        "target_modules": [*targets, *static],
        "modules_to_save": list(anatomy.projectors) if adapter.projector == "full" else None,
    }
    if adapter.method == "lora":
        alpha: Any = adapter.alpha  # a float works and is documented
        return LoraConfig(r=adapter.r, lora_alpha=alpha, lora_dropout=adapter.dropout, **which)
    return MixLoraConfig(
        **{name: getattr(adapter, name) for name in SETTINGS},
        dropout=adapter.dropout,
        tasks=list(tasks) if adapter.route_on == "task" or adapter.task_mix > 0 else None,
        static_modules=static or None,
        **which,
    )


def adapter_problems(adapter: Adapter, anatomy: Anatomy) -> list[str]:
    """What will surprise in this adapter on this model, each in one sentence."""
    if adapter.projector == "full" and anatomy.vision and not anatomy.projectors:
        return [
            "adapter.projector: full, but between the model's vision tower and its decoder no projector was found: the "
            "decoder's adapter alone is trained (adapter.projector=frozen says so)."
        ]
    return []


def _projector_targets(anatomy: Anatomy) -> list[str]:
    """The projector's layers that take factors. Raises UserError where there is none."""
    if not anatomy.projector_targets:
        raise UserError(
            "The projector of this model has no linear layer that could take factors"
            f" ({', '.join(anatomy.projectors) or 'there is none'}).",
            where="adapter.projector: lora",
            fix="Set adapter.projector: full, or frozen.",
        )
    return list(anatomy.projector_targets)
