"""Names of an export's folders: the tasks' own where a file system can hold them, and never two alike."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmixlora.export.names import folder_names, mixture_name, safe_name


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("PlotQA+visual_question_answering", "PlotQA+visual_question_answering"),
        ("../x y/é", "__x_y_é"),
        ("", "_"),
        ("..", "_"),
        ("c=1", "c_1"),
        ("zählen", "zählen"),
        ("数を数える", "数を数える"),
        ("गिनती करना", "गिनती_करना"),  # its vowels are marks, not letters
        ("e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("com\N{SUPERSCRIPT ONE}", "_com\N{SUPERSCRIPT ONE}"),
        ("a.", "a_"),
        (".hidden", "_hidden"),
        ("--all", "_--all"),
        (".-x", "_-x"),
        ('<>:"/\\|?*\0\n', "_" * 11),
    ],
)
def test_a_folder_has_the_tasks_name_where_files_can_have_it(task: str, folder: str) -> None:
    assert safe_name(task) == folder


@pytest.mark.parametrize(
    "alike",
    [
        ["a/b", "a b"],
        ["case", "Case", "CASE"],
        ["e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LETTER E WITH ACUTE}"],
        ["straße", "STRASSE"],
        ["🙂", "🙃"],
        ["all", "other"],  # `all` is the name of all tasks together
        ["x" * 500, "x" * 501],
    ],
)
def test_two_tasks_never_share_a_folder(alike: list[str]) -> None:
    tasks = [*alike, "plain"]
    names = folder_names(tasks)
    folded = {
        unicodedata.normalize("NFC", name).casefold() for name in (*names.values(), mixture_name(even(tasks), tasks))
    }
    assert len(folded) == len(tasks) + 1 and names["plain"] == "plain"
    assert names == folder_names(list(reversed(tasks)))


def even(tasks: list[str]) -> dict[str, float]:
    return dict.fromkeys(tasks, 1 / len(tasks))


@given(st.lists(st.text(max_size=200), min_size=1, unique=True))
def test_names_are_few_bytes_safe_and_of_one_task(tasks: list[str]) -> None:
    names = list(folder_names(tasks).values())
    assert len({name.casefold() for name in names}) == len(tasks)
    for name in names:
        assert name and len(f".{name}-merged.1234567.tmp".encode()) <= 255
        assert not name.startswith((".", "-")) and not name.endswith((".", " ")) and not set(name) & set('<>:"/\\|?*\0')


KNOWN = ["a", "b", "c", "a+b", "d+e", "f"]


@pytest.mark.parametrize(
    ("shares", "name"),
    [
        (even(KNOWN), "all"),
        ({"a": 0.5, "c": 0.5}, "a+c"),
        ({"c": 0.5, "a": 0.5}, "a+c"),
        ({"a": 0.25, "c": 0.75}, "a=0.25+c=0.75"),
        ({"c": 1.0}, "c"),
    ],
)
def test_a_mixture_is_named_by_its_shares(shares: dict[str, float], name: str) -> None:
    assert mixture_name(shares, KNOWN) == name


def test_other_shares_have_another_folder() -> None:
    mixtures = [
        {"a": 0.5, "b": 0.5},  # not the folder of the task a+b
        {"a": 1 / 3, "b": 2 / 3},
        {"a": 0.333, "b": 0.667},
        {"a": 0.3331, "b": 0.6669},
        {"a": 0.5, "b": 0.25, "c": 0.25},
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
        {"a+b": 0.5, "c": 0.5},
        even(KNOWN),
        {**dict.fromkeys(KNOWN, 0.1), "a": 0.5},
    ]
    names = [mixture_name(shares, KNOWN) for shares in mixtures] + list(folder_names(KNOWN).values())
    assert len(set(names)) == len(mixtures) + len(KNOWN)


def test_a_mixture_of_many_tasks_has_a_short_name() -> None:
    tasks = [f"task number {index}" for index in range(3000)]
    assert len(mixture_name(even(tasks[1:]), tasks)) <= 120
