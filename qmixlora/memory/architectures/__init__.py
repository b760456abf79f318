"""Models that can be planned before anything is downloaded: the facts of their configurations that decide sizes."""

from __future__ import annotations

import copy

from transformers import CONFIG_MAPPING, PretrainedConfig

from qmixlora.backbone import read_config, source_of
from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .parts import Facts
from .published import PUBLISHED
from .remembered import REMEMBERED

# a family that this release of transformers has no class for cannot be planned
ARCHITECTURES: dict[str, Facts] = {
    name: facts for name, facts in {**PUBLISHED, **REMEMBERED}.items() if facts["model_type"] in CONFIG_MAPPING
}


def config_of(spec: Model) -> PretrainedConfig:
    """The configuration of a recipe's model: from the table, a local folder, or the hub.

    Raises:
        UserError: it is in none of them.
    """
    if spec.id in ARCHITECTURES:
        facts = copy.deepcopy(ARCHITECTURES[spec.id])  # configurations keep, and change, the dicts that they are given
        config: PretrainedConfig = CONFIG_MAPPING[facts.pop("model_type")](**facts)
        return config
    try:
        return read_config(spec, **source_of(spec))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model's configuration cannot be read: {error}",
            where=f"model.id: {spec.id}",
            fix=f"Give a local folder, be online once, or use one of: {', '.join(ARCHITECTURES)}.",
        ) from error
