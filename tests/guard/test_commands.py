"""Every command line and every link in the documents is one that there is."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from qmixlora.cli.main import app

from qmixlora.recipe import edited, load_recipe, read_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
IN_TEXT = re.compile(r"`(qmixlora [a-z][^`]*|make [a-z-]+)`")
CAPITALS = re.compile(r"[A-Z]{2,}|\.\.\.")  # of a command that is described, not given


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of a block of commands, and of every command in a text."""
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # which tells of commands as they were
            continue
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"^    (qmixlora .*)$", text, re.MULTILINE)
        lines = [re.split(r"\s{3,}|\s#", line.strip())[0] for line in lines]
        for line in [*lines, *(" ".join(found.split()) for found in IN_TEXT.findall(text))]:
            if line.startswith(("qmixlora ", "make ")):
                yield page.relative_to(ROOT).as_posix(), line


COMMANDS = sorted(set(commands()))


def parsed(words: list[str]) -> Any:
    """The context of a command line, as it is before the command runs. Raises what the command line would."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("qmixlora", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    return context


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value).replace("/", "_"))
def test_a_command_line_in_a_document_is_understood(page: str, command: str) -> None:
    verb, *words = shlex.split(command)
    if verb == "make":
        assert words[0] in TARGETS
        return
    if len(words) == 1:  # the verb alone, in a text
        assert words[0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
        return
    given = not CAPITALS.search(command)
    context = parsed([re.sub(r"^[A-Z]$", "1", word) for word in words if word != "..."])  # N is a number, M a name
    for override in (context.params.get("overrides") or []) if given else []:
        edited(load_recipe("tiny-cpu"), [override])
    recipe = context.params.get("recipe") or context.params.get("name")
    if given and isinstance(recipe, str) and not recipe.startswith(("my", "runs/")) and "=" not in recipe:
        read_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_in_a_document_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, link


def test_every_extra_that_a_document_names_can_be_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for extra in re.findall(r"(?:qmixlora|'\.)\[(\w+)\]", page.read_text(encoding="utf-8")):
            assert extra in extras, (page.name, extra)


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    listed = re.findall(r"[\w-]+\.md", navigation)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("folder", ["qmixlora", "cli"])
def test_what_is_filled_into_a_printed_command_is_quoted(folder: str) -> None:
    """By `typed`, which knows shells: a folder may have spaces in its name."""
    verbs = "|".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    bare = re.compile(rf"qmixlora (?:{verbs}) (?:--[\w-]+ )*\{{")
    for module in sorted((ROOT / folder).rglob("*.py")):
        assert not bare.search(module.read_text(encoding="utf-8")), module


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 50
