"""A survey of a data set says what the collator would make of it, without making it.

The tokens of images are compared with every family's processor in `backbone/image_tokens/test_families.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import LlavaProcessor

from qmixlora.data import Collator, load_conversations
from qmixlora.data.checking import survey as module
from qmixlora.data.checking.survey import Survey
from qmixlora.errors import UserError

from ..helpers import GPT, Write
from ..helpers import surveyed as survey

WORDS = (1, 9, 3, 5)  # in the question of each sample
IMAGES = (1, 0, 2, 1)  # of each sample, of four tokens each


@pytest.fixture
def collator(processor: Any) -> Collator:
    return Collator(processor, 64)


@pytest.fixture
def rows(write_json: Write, tmp_path: Path, image: str) -> Any:
    samples = []
    for words, images in zip(WORDS, IMAGES, strict=True):
        question = "<image> " * images + "circle " * words
        samples.append({"image": [image] * images, "conversations": [{"from": "human", "value": question}, GPT]})
    return load_conversations(str(write_json("s.json", samples)))


@pytest.fixture
def surveyed(rows: Any, collator: Collator) -> Survey:
    return survey(rows, collator)


def lengths(rows: Any, collator: Collator) -> list[int]:
    return [collator([row])["input_ids"].shape[1] for row in rows]


def test_the_longest_sample_has_the_length_that_the_collator_gives_it(
    surveyed: Survey, rows: Any, collator: Collator
) -> None:
    assert surveyed.most_tokens == max(lengths(rows, collator))


def test_a_sample_that_the_template_refuses_for_its_words_is_named(rows: Any, processor: Any) -> None:
    choosy = copy.copy(processor)
    choosy.chat_template += (
        "{% if 'circle circle circle circle' in messages | string %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"(?s)cannot render this conversation: no.*row 1 \(from 0\) \(task"):
        survey(rows, Collator(choosy, 1000))


def test_samples_are_sorted_by_their_lengths(surveyed: Survey, rows: Any, collator: Collator) -> None:
    real = lengths(rows, collator)
    assert [real[index] for index in surveyed.longest] == sorted(real, reverse=True)


def test_samples_are_sorted_by_their_images_and_then_by_their_lengths(surveyed: Survey) -> None:
    assert surveyed.largest_images == [2, 3, 0, 1] and surveyed.most_image_tokens == 8


def test_all_samples_are_counted_and_the_median_is_one_of_them(surveyed: Survey, rows: Any, collator: Collator) -> None:
    real = sorted(lengths(rows, collator))
    assert surveyed.samples == 4 and real[1] <= surveyed.median <= real[2] <= surveyed.p99


def test_tasks_that_take_turns_are_all_sampled(
    write_json: Write, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth row is long; a sample of every tenth would be of long ones alone, or of none."""
    samples = [
        {"conversations": [{"from": "human", "value": "circle " * (40 if index % 10 == 0 else 1)}, GPT]}
        for index in range(500)
    ]
    monkeypatch.setattr(module, "SAMPLED", 50)
    surveyed = survey(load_conversations(str(write_json("turns.json", samples))), collator)
    assert surveyed.median < 20 < surveyed.p99


def test_one_sample_is_its_own_median(rows: Any, collator: Collator) -> None:
    alone = survey(rows.select([1]), collator)
    assert alone.median == alone.p99 == alone.most_tokens


def test_it_reads_in_one_line(surveyed: Survey) -> None:
    assert str(surveyed).startswith("4 samples; tokens: median ") and "image tokens: largest 8" in str(surveyed)


def test_only_candidates_are_tokenised_for_the_longest(
    rows: Any, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 2)
    assert survey(rows, collator).longest == [2, 1] and len(survey(rows, collator).largest_images) == 2


def test_images_are_measured_and_not_decoded(write_json: Write, tmp_path: Path, collator: Collator) -> None:
    """A file that ends after its header has a size, and would not open."""
    Image.new("RGB", (40, 30)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    question = {"from": "human", "value": "<image> circle"}
    rows = load_conversations(str(write_json("s.json", [{"image": "cut.png", "conversations": [question, GPT]}])))
    assert survey(rows, collator).most_image_tokens == 4


class Uncounted(LlavaProcessor):  # type: ignore[misc]
    """One of the processors that do not count tokens for vLLM."""

    @property
    def _get_num_multimodal_tokens(self) -> Any:
        raise AttributeError("_get_num_multimodal_tokens")


def test_a_processor_that_does_not_count_gives_the_same_survey(surveyed: Survey, rows: Any, processor: Any) -> None:
    uncounted = copy.copy(processor)
    uncounted.__class__ = Uncounted
    assert survey(rows, Collator(uncounted, 64)) == surveyed
