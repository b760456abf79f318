"""A checkpoint of every family, opened as a user's is: by transformers' own choice of a processor, through a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from qmixlora.data import Conversation, load_conversations
from qmixlora.errors import UserError
from qmixlora.files import read_log
from qmixlora.inspection import decode_samples
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import is_adapter_parameter
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_model, open_session
from qmixlora.training import train
from tests.unit.data.helpers import surveyed
from tests.unit.training.waits import waits_of

from .families import MAKERS, TOGETHER, draw, image_tokens, marked

Checkpoint = Callable[[str], Path]
CACHED: dict[str, dict[str, Any]] = {"adapter": {"projector": "frozen"}, "train": {"cache_features": True}}
TEMPLATE = (
    "<bos> {% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
)
LIMITED = [  # family, budget, image tokens of a large square image without a budget and with it
    ("llava_onevision", 60, 88, 36),
    ("qwen2_vl", 12, 16, 9),
    ("qwen2_5_vl", 12, 16, 9),
    ("qwen3_vl", 12, 16, 9),
    ("internvl", 25, 40, 20),
    ("idefics3", 25, 68, 20),
    ("smolvlm", 25, 68, 20),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of a random model of a family, with its processor and a chat template."""

    @cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        config, processor = MAKERS[family]()
        processor.chat_template = TEMPLATE.replace("MARK", marked(processor))
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Four samples with images of several shapes, the second one the longest by its text, the third by its image."""
    samples = []
    for index, (shape, words) in enumerate([((40, 40), 2), ((30, 60), 9), ((112, 112), 2), ((60, 20), 3)]):
        draw(*shape).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image> " + "word " * words}, {"from": "gpt", "value": "word word"}]
        samples.append({"image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    return tmp_path / "data.json"


@pytest.fixture
def recipe_for(checkpoint: Checkpoint, make_recipe: Callable[..., Recipe], data_file: Path) -> Callable[..., Recipe]:
    """A recipe for a family's checkpoint and the four samples."""

    def make(family: str, **sections: dict[str, Any]) -> Recipe:
        model = {"id": str(checkpoint(family)), "quantization": "none"}
        data = {"train": str(data_file), "test": None, "max_length": 700, **sections.pop("data", {})}
        return make_recipe(model=model, data=data, **sections)

    return make


def rows(data_file: Path) -> list[Conversation]:
    return list(load_conversations(str(data_file)))


@pytest.mark.parametrize(("family", "budget", "unlimited", "limited"), LIMITED)
def test_inspected_samples_keep_to_the_limit_of_the_run(
    recipe_for: Callable[..., Recipe], family: str, budget: int, unlimited: int, limited: int
) -> None:
    for limit, tokens in ((None, unlimited), (budget, limited)):
        recipe = recipe_for(family, data={"max_image_tokens": limit})
        square = list(decode_samples(recipe, "train", 3))[2]  # 112 x 112
        shown = sum(int(count) for _, text in square.pieces for count in re.findall(r"\[(\d+) image tokens", text))
        assert shown == tokens


@pytest.mark.parametrize("family", MAKERS)
def test_transformers_picks_the_processor_that_these_tests_use(checkpoint: Checkpoint, family: str) -> None:
    loaded, (_, made) = AutoProcessor.from_pretrained(checkpoint(family)), MAKERS[family]()
    assert type(loaded) is type(made) and type(loaded.image_processor) is type(made.image_processor)


@pytest.mark.parametrize("opened", [lambda recipe: open_session(recipe, []), open_model], ids=["tuned", "whole"])
@pytest.mark.parametrize(("family", "budget", "most", "limited"), LIMITED)
def test_a_recipe_keeps_images_small(
    recipe_for: Callable[..., Recipe],
    data_file: Path,
    opened: Callable[[Recipe], Session],
    family: str,
    budget: int,
    most: int,
    limited: int,
) -> None:
    large = rows(data_file)[2]
    assert image_tokens(opened(recipe_for(family)).collator([large])) == most
    assert image_tokens(opened(recipe_for(family, data={"max_image_tokens": budget})).collator([large])) == limited


def test_a_recipe_with_a_budget_under_the_smallest_image_is_refused(recipe_for: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="at least 4 tokens in this model"):
        open_model(recipe_for("idefics3", data={"max_image_tokens": 3}))


@pytest.mark.parametrize("family", MAKERS)
def test_a_survey_counts_the_tokens_that_samples_get(
    recipe_for: Callable[..., Recipe], data_file: Path, family: str
) -> None:
    session, samples = open_session(recipe_for(family), []), load_conversations(str(data_file))
    found = surveyed(samples, session.collator)
    lengths = [session.collator([row])["input_ids"].shape[1] for row in samples]
    assert found.most_tokens == max(lengths)
    assert lengths[found.longest[0]] == max(lengths)


@pytest.mark.parametrize("family", MAKERS)
def test_a_step_on_real_images_reaches_adapter_and_projector(
    recipe_for: Callable[..., Recipe], data_file: Path, family: str
) -> None:
    session = open_session(recipe_for(family), [])
    loss = supervised_loss(session.model.train(), session.collator(rows(data_file)))
    loss.backward()
    adapter = {name: p.grad for name, p in session.model.named_parameters() if is_adapter_parameter(name)}
    projector = {name: p.grad for name, p in session.model.named_parameters() if ".modules_to_save." in name}
    for part in (adapter, projector):
        assert any(gradient is not None and gradient.any() for gradient in part.values())


@pytest.mark.parametrize("family", MAKERS)
def test_what_a_family_waits_for_is_its_own(
    recipe_for: Callable[..., Recipe], data_file: Path, tmp_path: Path, family: str
) -> None:
    """(Families with images of any shape wait in their towers.)"""
    cuda = waits_of(recipe_for(family), rows(data_file), tmp_path)
    assert cuda.waits and not [wait for wait in cuda.waits if wait.is_ours], cuda.table()
    assert not any(cuda.count(phase) for phase in ("batch", "between", "after")), cuda.table()


@pytest.mark.parametrize("family", sorted(TOGETHER))
def test_features_that_are_not_by_image_are_not_cached(recipe_for: Callable[..., Recipe], family: str) -> None:
    with pytest.raises(UserError, match="other features of an image than can be kept"):
        train(recipe_for(family, **CACHED), console=Console(quiet=True))


SOME = {"llava", "internvl", "qwen2_5_vl"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.long if family in SOME else pytest.mark.exhaustive)
        for family in sorted(MAKERS.keys() - TOGETHER)
    ],
)
def test_a_run_with_cached_features_is_the_run_without(
    recipe_for: Callable[..., Recipe], tmp_path: Path, family: str
) -> None:
    losses = []
    for cached in (False, True):
        steps = {"output": str(tmp_path / str(cached)), "max_steps": 2, "micro_batch_size": 2, "cache_features": cached}
        recipe = recipe_for(family, adapter={"projector": "frozen"}, train=steps)
        log = read_log(train(recipe, console=Console(quiet=True)) / "metrics.jsonl")
        losses.append([record["loss"] for record in log if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
