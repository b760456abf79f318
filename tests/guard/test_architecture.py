"""The house stays as it is drawn: imports point one way, files stay small, the command line stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 300, 50  # as CONTRIBUTING.md says
STANDS_ON = {  # floor of qmixlora -> the floors that it imports; each stands on those above it in this list
    "errors": set(),
    "files": {"errors"},
    "manifest": {"errors", "files"},
    "bases": {"errors", "files"},
    "interrupts": set(),
    "launch": {"interrupts"},
    "progress": {"launch"},
    "device": {"launch"},
    "serving": {"errors", "files", "bases", "device"},
    "webpage": {"files"},
    "doctor": {"device"},
    "parallel": {"errors"},
    "garbage": set(),
    "processes": {"launch", "device", "parallel"},
    "out_of_memory": {"errors", "processes"},
    "recipe": {"errors"},
    "registration": set(),
    "reader": set(),
    "mixlora": set(),
    "backbone": {"errors", "bases", "progress", "device", "recipe", "reader"},
    "data": {"errors", "files", "progress", "parallel", "garbage", "recipe", "reader", "mixlora"},
    "adapter": {"errors", "files", "bases", "recipe", "mixlora", "backbone"},
    "session": {
        "errors",
        "manifest",
        "device",
        "processes",
        "out_of_memory",
        "recipe",
        "mixlora",
        "backbone",
        "data",
        "adapter",
    },
    "loss": {"errors", "backbone", "data"},
    "evaluation": {"errors", "files", "recipe", "mixlora", "data", "session"},
    "chat": {"errors", "device", "mixlora", "data", "adapter", "session", "evaluation"},
    "memory": {
        "errors",
        "files",
        "device",
        "parallel",
        "recipe",
        "mixlora",
        "backbone",
        "data",
        "adapter",
        "session",
        "loss",
    },
    "training": {
        "interrupts",
        "errors",
        "files",
        "manifest",
        "launch",
        "progress",
        "device",
        "parallel",
        "processes",
        "out_of_memory",
        "recipe",
        "mixlora",
        "backbone",
        "data",
        "adapter",
        "session",
        "loss",
        "evaluation",
        "memory",
    },
    "inspection": {"errors", "recipe", "mixlora", "webpage", "backbone", "data", "session", "loss"},
    "export": {
        "errors",
        "files",
        "manifest",
        "bases",
        "serving",
        "progress",
        "device",
        "out_of_memory",
        "recipe",
        "mixlora",
        "backbone",
        "data",
        "adapter",
        "session",
        "loss",
        "evaluation",
        "training",
    },
    "report": {"errors", "files", "manifest", "bases", "serving", "webpage", "recipe", "mixlora", "data", "evaluation"},
    "demo": {
        "errors",
        "files",
        "device",
        "progress",
        "recipe",
        "data",
        "session",
        "evaluation",
        "training",
        "export",
        "report",
    },
}
METHOD_USES = {"torch", "peft", "safetensors", *sys.stdlib_module_names}


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT / "qmixlora").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Floors of qmixlora that a file imports, absolutely or relatively."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    modules = set()
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
        modules |= {name.split(".")[1] for name in names if name.startswith("qmixlora.")}
    return modules


def functions(path: Path) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


FILES = sorted(path for folder in ("qmixlora", "cli") for path in (ROOT / folder).rglob("*.py"))


def test_every_floor_imports_just_what_is_drawn() -> None:
    imports: dict[str, set[str]] = {floor: set() for floor in STANDS_ON}
    for path in (ROOT / "qmixlora").rglob("*.py"):
        if (floor := floor_of(path)) != "__init__":
            imports[floor] |= imported(path) - {floor}
    assert imports == STANDS_ON


def test_every_floor_stands_on_those_above_it_in_the_list() -> None:
    order = list(STANDS_ON)
    for floor, below in STANDS_ON.items():
        assert all(order.index(other) < order.index(floor) for other in below), floor


def test_the_contributing_page_draws_every_floor() -> None:
    drawing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for floor in STANDS_ON:
        name = f"{floor}.py" if (ROOT / "qmixlora" / f"{floor}.py").is_file() else f"{floor}/"
        assert f"    {name}" in drawing or f"/{name}" in drawing, floor


def test_the_method_uses_torch_and_peft_only() -> None:
    for path in (ROOT / "qmixlora" / "mixlora").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in METHOD_USES, path


def test_files_stay_short() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > LINES_OF_A_FILE}


def test_functions_stay_short() -> None:
    lengths = {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for path in FILES for node in functions(path)
    }
    assert not {name: length for name, length in lengths.items() if length > LINES_OF_A_FUNCTION}


def test_the_contributing_page_names_the_same_limits() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"under {LINES_OF_A_FILE} lines" in text and f"functions of at most {LINES_OF_A_FUNCTION}" in text


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


def test_every_verb_keeps_the_libraries_quiet() -> None:
    helpers = {"__init__", "ending", "here", "main", "output", "overrides", "quiet"}
    reads_files_alone = {"pick", "route", "serve_files"}
    verbs = {path for path in (ROOT / "cli").glob("*.py") if path.stem not in helpers | reads_files_alone}
    assert not {path.stem for path in verbs if "    quiet()\n" not in path.read_text(encoding="utf-8")}
