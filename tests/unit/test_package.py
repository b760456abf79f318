"""`import qmixlora` is all it takes, in any order, and costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = "assert peft.get_peft_config({'peft_type': 'CONDITIONAL_MIXLORA'}).num_factors == 16"


@pytest.mark.parametrize(
    "script",
    [
        f"import qmixlora, sys\nassert not {{'torch', 'peft'}} & set(sys.modules)\nimport peft\n{USE}",
        f"import peft, qmixlora\n{USE}",
        f"import qmixlora, importlib.util\nassert importlib.util.find_spec('peft')\nimport peft\n{USE}",
        "from qmixlora import MixLoraConfig\nassert MixLoraConfig(r=2).r == 2",
    ],
)
def test_import_registers_the_method(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
