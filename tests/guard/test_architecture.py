"""The house stays as it is drawn: imports point one way, files stay small, the command line stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDS_ON = {  # module of qmixlora -> what it may import of qmixlora
    "errors": set(),
    "files": {"errors"},
    "recipe": {"errors", "recipes"},
    "mixlora": set(),
    "backbone": {"errors", "recipe"},
    "data": {"errors"},
    "session": {"errors", "recipe", "mixlora", "backbone", "data"},
    "evaluation": {"errors", "mixlora", "data"},
    "head": set(),
    "features": {"errors", "recipe", "backbone", "data", "session", "evaluation"},
    "loss": {"errors", "data", "head"},
    "statistics": {"mixlora", "session", "evaluation", "head"},
    "callbacks": {"errors", "backbone", "session", "statistics"},
    "recovery": {"errors"},
    "training": {"errors", "files", "recipe", "data", "session", "features", "loss", "callbacks", "recovery"},
    "interference": {"errors", "session", "evaluation", "loss"},
    "export": {
        "errors",
        "files",
        "recipe",
        "mixlora",
        "backbone",
        "data",
        "session",
        "evaluation",
        "loss",
        "statistics",
        "callbacks",
        "training",
    },
    "memory": {
        "errors",
        "files",
        "recipe",
        "backbone",
        "data",
        "session",
        "evaluation",
        "loss",
        "callbacks",
        "recovery",
        "features",
        "training",
    },
    "report": {"errors", "statistics"},
    "inspection": {"recipe", "data", "training"},
    "machine": set(),
    "demo": {"errors", "files", "recipe", "data", "session", "evaluation", "training", "export", "memory"},
}


def imported(path: Path) -> set[str]:
    """Modules of qmixlora that a file imports, absolutely or relatively."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "qmixlora" else []
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("qmixlora.")}
    return found


def test_imports_point_one_way() -> None:
    for path in sorted((ROOT / "qmixlora").rglob("*.py")):
        part = path.relative_to(ROOT / "qmixlora").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert imported(path) - {part} <= STANDS_ON[part], path
    order = list(STANDS_ON)
    for part, below in STANDS_ON.items():
        assert all(order.index(other) < order.index(part) for other in below - {"recipes"})


def test_the_method_knows_torch_and_peft_only() -> None:
    for path in (ROOT / "qmixlora" / "mixlora").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in {"torch", "peft", *sys.stdlib_module_names}, path


def test_files_stay_under_300_lines() -> None:
    long = {
        str(path): count
        for folder in ("qmixlora", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long


def test_functions_stay_under_60_lines() -> None:
    for folder in ("qmixlora", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{path}:{node.name}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "list"], ["recipes", "schema"]])
def test_the_command_line_imports_no_torch_before_it_must(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom qmixlora.cli.main import run\n"
        f"sys.argv = ['qmixlora', *{arguments!r}]\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_global_but_qmixlora_is_installed() -> None:
    script = (
        "import importlib.util as u, qmixlora.cli.main, qmixlora.recipes\n"
        "print(u.find_spec('cli'), u.find_spec('recipes'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.strip() == "None None", done.stdout + done.stderr
