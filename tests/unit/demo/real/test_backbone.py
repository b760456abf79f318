"""The real backbone: an ordinary checkpoint; only its sight is trained; made again from where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qmixlora.demo.real.backbone import (
    FORM,
    IMAGE_TOKENS,
    WORDS,
    Captions,
    Words,
    assemble,
    caption_batch,
    word_batch,
    words_of,
)
from qmixlora.demo.real.english import things
from qmixlora.demo.scenes import draw_scene, sample_scene
from tests.standin import small_language_model

Make = Callable[..., Path]


class StoppedError(Exception):
    """What stops a training in its middle."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    return state


def assembled() -> tuple[Any, Any]:
    return assemble(*small_language_model(), seed=0)


def test_tower_and_projector_alone_are_trained(make: Make, tmp_path: Path) -> None:
    before, after = assembled()[0].state_dict(), weights(make(tmp_path / "a"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}


@pytest.mark.long
@pytest.mark.parametrize(("last", "left"), [(3, [3, 4, 16, 28, 40, 52]), (28, [28, 40, 52])])
def test_a_training_that_was_stopped_goes_on_where_it_was(
    make: Make, tmp_path: Path, last: int, left: list[int]
) -> None:
    def stop(done: int, total: int) -> None:
        if done == last:
            raise StoppedError

    whole = weights(make(tmp_path / "whole"))
    with pytest.raises(StoppedError):
        make(tmp_path / "stopped", stop)
    assert not (tmp_path / "stopped").exists()
    told: list[int] = []
    again = weights(make(tmp_path / "stopped", lambda done, total: told.append(done)))
    assert told == left  # the step before was the last that was kept
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_real_backbone_that_is_there_is_not_made_again(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    told: list[int] = []
    assert make(folder, lambda done, total: told.append(done)) == folder and told == []


def test_the_processor_asks_as_the_language_model_was_taught_to_be_asked(make: Make, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(make(tmp_path / "a"))
    content = [{"type": "image"}, {"type": "text", "text": "Well?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWell?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor(text=[text], images=[draw_scene(a_scene())])["input_ids"][0]
    assert ids.count(processor.image_token_id) == IMAGE_TOKENS


def a_scene() -> Any:
    return sample_scene(random.Random(2), range(10))


@pytest.mark.usefixtures("few_steps")
def test_captions_are_learned_and_nothing_before_them() -> None:
    _, processor = assembled()
    batch = caption_batch(processor, seed=1)
    learned = batch["labels"][0][batch["labels"][0] != -100]
    text = processor.tokenizer.decode(learned)
    assert text.endswith(".<|im_end|>") and sum(f"{side} " in text.lower() for side in ("top", "bottom")) == 2
    assert (batch["labels"][:, : IMAGE_TOKENS + 14] == -100).all()
    assert (batch["input_ids"][:, :IMAGE_TOKENS] == processor.image_token_id).all()


def test_the_tokens_of_an_image_are_the_words_of_its_cells() -> None:
    scene, tokenizer = a_scene(), assembled()[1].tokenizer
    read = [tokenizer.decode(words_of(scene, tokenizer)[cell * WORDS :][:WORDS]) for cell in range(4)]
    assert read == [thing[-WORDS:] for _, thing in sorted(things(scene).items())]  # the stand-in's words are letters


@pytest.mark.usefixtures("few_steps")
def test_an_image_token_comes_near_its_word_and_away_from_others() -> None:
    model, processor = assembled()
    sight, batch = Words(model, processor.tokenizer), word_batch(processor, seed=1)
    right_BC = torch.searchsorted(sight.known_N, batch["words_BC"])
    optimizer = torch.optim.AdamW(sight.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sight(**batch)["loss"].backward()
        optimizer.step()
    nearest_BC = sight.distances(sight.features(batch["pixel_values"])).argmin(dim=2)
    assert (nearest_BC == right_BC).float().mean() > 0.9


@pytest.mark.usefixtures("few_steps")
def test_a_caption_comes_after_the_prefix_as_if_it_was_read_anew() -> None:
    model, processor = assembled()
    sight, batch = Captions(model.eval(), processor.tokenizer), caption_batch(processor, seed=1)
    prefix = f"<|im_start|>system\n{FORM}<|im_end|>\n<|im_start|>user\n"
    before = processor.tokenizer([prefix] * 2, add_special_tokens=False, return_tensors="pt")
    whole = {name: torch.cat([before[name], batch[name]], dim=1) for name in before}
    labels = torch.cat([torch.full_like(before["input_ids"], -100), batch["labels"]], dim=1)
    with torch.no_grad():
        anew = model(**whole, labels=labels, pixel_values=batch["pixel_values"]).loss
        assert (sight(**batch).loss - anew).abs() < 1e-5
        assert (sight(**batch).loss - anew).abs() < 1e-5  # and once more: the prefix is as it was
