"""`import qmixlora` is all it takes, in any order, costs nothing, and leaves peft an ordinary package."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

USE = "assert peft.get_peft_config({'peft_type': 'CONDITIONAL_MIXLORA'}).num_factors == 16"
PEFT_AFTER_QMIXLORA = """
import qmixlora
import importlib.resources, importlib.util, inspect, json
before = importlib.util.find_spec('peft')
import peft
after = importlib.util.find_spec('peft')
registered = 'CONDITIONAL_MIXLORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING
importlib.reload(peft)
print(json.dumps({
    'registered': registered,
    'registered after a reload': 'CONDITIONAL_MIXLORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING,
    'loaders': [type(spec.loader).__name__ for spec in (before, after, peft.__spec__)],
    'marker': importlib.resources.files('peft').joinpath('py.typed').is_file(),
    'source': inspect.getsource(peft),
}))
"""


def run(script: str) -> str:
    """The output of a script in a process of its own, for an import happens once in a process."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def peft_after_qmixlora() -> dict[str, Any]:
    """The facts about peft in a process that imported qmixlora, looked peft up, and then imported it."""
    facts: dict[str, Any] = json.loads(run(PEFT_AFTER_QMIXLORA))
    return facts


def test_the_method_is_registered_when_peft_comes_later(peft_after_qmixlora: dict[str, Any]) -> None:
    assert peft_after_qmixlora["registered"]


def test_the_registration_outlives_a_reload_of_peft(peft_after_qmixlora: dict[str, Any]) -> None:
    assert peft_after_qmixlora["registered after a reload"]


def test_peft_keeps_its_own_loader(peft_after_qmixlora: dict[str, Any]) -> None:
    assert peft_after_qmixlora["loaders"] == ["SourceFileLoader"] * 3


def test_the_resources_of_peft_are_found(peft_after_qmixlora: dict[str, Any]) -> None:
    assert peft_after_qmixlora["marker"]


def test_the_source_of_peft_is_shown(peft_after_qmixlora: dict[str, Any]) -> None:
    assert "get_peft_model" in peft_after_qmixlora["source"]


@pytest.mark.long
def test_the_method_is_registered_when_peft_came_first() -> None:
    run(f"import peft, qmixlora\n{USE}")


@pytest.mark.long
def test_the_config_is_imported_without_peft_before_it() -> None:
    run(f"from qmixlora import MixLoraConfig\nassert MixLoraConfig(r=2).r == 2\nimport peft\n{USE}")


def test_the_import_costs_neither_torch_nor_peft() -> None:
    run("import qmixlora, sys\nassert not {'torch', 'peft'} & set(sys.modules)")
