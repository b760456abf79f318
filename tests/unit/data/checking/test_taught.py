"""What a model is taught is known before the first step: rows that do not fit are listed at once, or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.data import Collator, Lengths, load_split, taught
from qmixlora.data.checking import look, verdicts
from qmixlora.data.reading import store
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, edited
from qmixlora.session import make_collator

LONG = 300  # words, of which max_length holds fewer


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path], tmp_path: Path) -> Recipe:
    """Twenty samples, of which 4 and 17 are too long, and 9 is a line that CLIP would scale to a million rows."""
    rows = []
    for index in range(20):
        Image.new("RGB", (1, 200_000) if index == 9 else (28, 28)).save(tmp_path / f"{index}.png")
        answer = " ".join(["red"] * (LONG if index in (4, 17) else 3))
        question = {"from": "human", "value": f"<image>\nwhat color is it ? {index}"}
        rows.append({"image": f"{index}.png", "conversations": [question, {"from": "gpt", "value": answer}]})
    return make_recipe(data={"train": str(write_json("data.json", rows)), "max_length": 128})


@pytest.fixture
def teach(processor: Any) -> Callable[[Recipe], Any]:
    def call(recipe: Recipe) -> Any:
        return taught(recipe.data, Collator(processor, recipe.data.max_length), ["train"]).rows["train"]

    return call


def test_all_rows_that_do_not_fit_are_listed_at_once(recipe: Recipe, teach: Callable[[Recipe], Any]) -> None:
    with pytest.raises(UserError, match="3 samples cannot be used") as refused:
        teach(recipe)
    message = str(refused.value)
    for words in ("row 4 (", "row 17 (", "tokens, over data.max_length, 128", "row 9 (", "1 x 200000 pixels"):
        assert words in message
    assert "data.on_bad_sample" in message


def test_rows_that_do_not_fit_are_left_out_and_counted(
    recipe: Recipe, teach: Callable[[Recipe], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = teach(edited(recipe, ["data.on_bad_sample=skip"]))
    assert len(rows) == 17
    assert "3 of 20 samples left out" in capsys.readouterr().err


def test_rows_that_fit_are_handed_on_as_they_are(recipe: Recipe, teach: Callable[[Recipe], Any]) -> None:
    all_fit = edited(recipe, ["data.max_length=1000", "data.max_pixels=300000000"])
    assert teach(all_fit)["turns"] == load_split(all_fit.data, "train")["turns"]


def test_the_longest_that_fits_is_taken_and_a_token_less_room_refuses_it(
    recipe: Recipe, teach: Callable[[Recipe], Any], processor: Any
) -> None:
    wide = edited(recipe, ["data.max_pixels=300000000"])
    collator = Collator(processor, 1000)
    longest = max(len(collator([row])["input_ids"][0]) for row in load_split(wide.data, "train").select([4, 17]))
    assert len(teach(edited(wide, [f"data.max_length={longest}"]))) == 20
    with pytest.raises(UserError, match=f"A sample has {longest} tokens|samples cannot be used"):
        teach(edited(wide, [f"data.max_length={longest - 1}"]))


def test_broken_bodies_are_found_where_that_is_asked_for(
    recipe: Recipe, teach: Callable[[Recipe], Any], tmp_path: Path
) -> None:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "3.png", "JPEG", quality=95)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) * 7 // 10])
    fits = edited(recipe, ["data.max_length=1000", "data.max_pixels=300000000"])
    assert len(teach(fits)) == 20
    with pytest.raises(UserError, match=r"3\.png of .*data.json, line 1, row 3 \(from 0\)"):
        teach(edited(fits, ["data.check_images=full"]))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """One entry for every look at rows, of which ten are many."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "MANY", 10)
    looks: list[int] = []
    look_at = verdicts.look_at
    monkeypatch.setattr(verdicts, "look_at", lambda *given: looks.append(1) or look_at(*given))
    return looks


@pytest.mark.parametrize("small", [0, store.SMALL])
@pytest.mark.parametrize("check", ["header", "full"])
def test_what_was_found_in_many_rows_is_remembered_until_something_changes(
    recipe: Recipe,
    teach: Callable[[Recipe], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: list[int],
    small: int,
    check: str,
) -> None:
    monkeypatch.setattr(store, "SMALL", small)
    skips = edited(recipe, ["data.on_bad_sample=skip", f"data.check_images={check}"])
    assert [len(teach(skips)) for _ in range(3)] == [17] * 3 and len(looks) == 1
    assert len(teach(edited(skips, ["data.max_length=1000"]))) == 19 and len(looks) == 2
    lines = (tmp_path / "data.json").read_text(encoding="utf-8").replace(" 5", " 6")
    (tmp_path / "data.json").write_text(lines + " ", encoding="utf-8")
    assert len(teach(skips)) == 17 and len(looks) == 3
    Image.new("RGB", (1, 100_000)).save(tmp_path / "0.png")  # another image under the same name
    assert len(teach(skips)) == 16 and len(looks) == 4


def test_what_cannot_be_read_and_what_does_not_fit_is_one_list(
    recipe: Recipe, teach: Callable[[Recipe], Any], tmp_path: Path
) -> None:
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows[2]["image"], rows[6]["conversations"][1]["value"] = "gone.png", None
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UserError, match="5 samples cannot be used") as refused:
        teach(recipe)
    assert "gone.png" in str(refused.value) and "null as an answer" in str(refused.value)
    assert "data.json, line 1, row 17 (from 0) (task" in str(
        refused.value
    )  # by its place in the file, not by what is left
    assert "over data.max_length" in str(refused.value)


def test_nothing_that_fits_is_an_error_all_the_same(recipe: Recipe, teach: Callable[[Recipe], Any]) -> None:
    with pytest.raises(UserError, match="20 samples cannot be used") as refused:
        teach(edited(recipe, ["data.on_bad_sample=skip", "data.max_length=8"]))
    assert "there are no others" in refused.value.fix


def test_all_splits_are_one_list(recipe: Recipe, processor: Any, tmp_path: Path) -> None:
    both = edited(recipe, [f"data.validation={tmp_path / 'data.json'}"])
    with pytest.raises(UserError, match="6 samples cannot be used"):
        taught(both.data, Collator(processor, 128), ["train", "validation"])


def test_answers_that_the_template_rewrites_are_a_warning(recipe: Recipe, processor: Any) -> None:
    """It shortens them, and that would be learned in silence."""
    shortened = copy(processor)
    shortened.chat_template = processor.chat_template.replace("part.text", "part.text.split(' red')[0]")
    assert shortened.chat_template != processor.chat_template
    skipped = edited(recipe, ["data.on_bad_sample=skip"])
    told = [
        taught(skipped.data, Collator(own, 128), ["train"]).facts(skipped.train).warnings
        for own in (shortened, processor)
    ]
    assert "data.train: 19 of the first 19 samples: The chat template does not write" in told[0][0] and told[1] == []


def test_a_date_that_the_template_writes_is_told(recipe: Recipe, processor: Any) -> None:
    dated = copy(processor)
    dated.chat_template = "{{ strftime_now('%d') }}" + processor.chat_template
    skips = edited(recipe, ["data.on_bad_sample=skip"])
    [told] = taught(skips.data, Collator(dated, 128), ["train"]).facts(skips.train).warnings
    assert told.startswith("data.train: 17 of the first 17 samples: The chat template writes the date")


def test_special_tokens_that_answers_hold_are_told_unless_they_are_named(
    recipe: Recipe, processor: Any, tmp_path: Path
) -> None:
    knows, token = deepcopy(processor), "<box>"
    knows.tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows[3]["conversations"][1]["value"] = f"{token} red"
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    skips = edited(recipe, ["data.on_bad_sample=skip"])
    told = [
        taught(skips.data, make_collator(named, knows), ["train"]).facts(skips.train).warnings
        for named in (skips, edited(skips, [f"data.special_tokens=[{token}]"]))
    ]
    assert told[0][0].startswith(f"data.train: 1 answers hold special tokens of the model ({token})") and not told[1]


def test_rows_that_the_template_refuses_for_their_pictures_are_listed_or_left_out(
    recipe: Recipe, processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a system's words, as Llama 3.2 Vision's does; text-only rows with these, and pictures alone, are right."""
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows[6]["system"] = rows[7]["system"] = "Be terse."
    del rows[7]["image"]
    rows[7]["conversations"][0]["value"] = "what color is it ?"
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    choosy = copy(processor)
    beside = """messages[0].role == 'system' and "'image'" in messages | string"""
    choosy.chat_template = f"{{% if {beside} %}}{{{{ raise_exception('no') }}}}{{% endif %}}" + processor.chat_template
    with pytest.raises(UserError, match=r"row 6 \(from 0\) \(task .*cannot render this conversation: no"):
        taught(recipe.data, Collator(choosy, 128), ["train"])
    skips = edited(recipe, ["data.on_bad_sample=skip"])
    assert len(taught(skips.data, Collator(choosy, 128), ["train"]).rows["train"]) == 16
    assert "4 of 20 samples left out" in capsys.readouterr().err


def test_a_row_is_named_by_its_question_and_not_by_what_a_system_says(
    recipe: Recipe, teach: Callable[[Recipe], Any], tmp_path: Path
) -> None:
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows[4]["system"] = "Be terse, in every answer."
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 4 \(from 0\) \(task all: 'what color is it \? 4'\): "):
        teach(recipe)


def test_rows_are_looked_at_alike_in_one_process_and_in_several(
    recipe: Recipe, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (3, 100):
        monkeypatch.setattr(look, "CHUNK", chunk)
        found.append(
            verdicts.verdict_on(load_split(recipe.data, "train"), Lengths(Collator(processor, 128)), recipe.data)
        )
    assert found[0] == found[1] and found[0].refusals.count == 3
