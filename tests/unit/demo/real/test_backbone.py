"""The real backbone: an ordinary checkpoint; only its sight is trained; made again from where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qmixlora.demo.real.backbone import FORM, Sight, assemble, caption_batch, fit_to_words
from qmixlora.demo.scenes import draw_scene, sample_scene
from tests.standin import small_language_model

Make = Callable[..., Path]


class StoppedError(Exception):
    """What stops a training in its middle."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    return state


def assembled(tower: Path) -> tuple[Any, Any]:
    return assemble(*small_language_model(), tower, seed=0)


def test_tower_and_projector_alone_are_trained(make: Make, tmp_path: Path, backbone: Path) -> None:
    before, after = assembled(backbone)[0].state_dict(), weights(make(tmp_path / "a"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}


def test_a_training_that_was_stopped_goes_on_where_it_was(make: Make, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise StoppedError

    whole = weights(make(tmp_path / "whole"))
    with pytest.raises(StoppedError):
        make(tmp_path / "stopped", stop)
    assert not (tmp_path / "stopped").exists()
    told: list[int] = []
    again = weights(make(tmp_path / "stopped", lambda done, total: told.append(done)))
    assert told == [3, 4]  # the second step was the last that was kept
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
    assert ids.count(processor.image_token_id) == 4


def a_scene() -> Any:
    return sample_scene(random.Random(2), range(10))


@pytest.mark.usefixtures("few_steps")
def test_captions_are_learned_and_nothing_before_them(backbone: Path) -> None:
    _, processor = assembled(backbone)
    batch = caption_batch(processor, seed=1)
    learned = batch["labels"][0][batch["labels"][0] != -100]
    text = processor.tokenizer.decode(learned)
    assert text.endswith(".<|im_end|>") and sum(f"{side} " in text.lower() for side in ("top", "bottom")) == 2
    assert (batch["labels"][:, :18] == -100).all() and (batch["input_ids"][:, :4] == processor.image_token_id).all()


@pytest.mark.usefixtures("few_steps")
def test_an_image_token_comes_near_the_words_of_its_cell(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = assembled(backbone)
    monkeypatch.setattr("qmixlora.demo.real.backbone.WORD_STEPS", 30)
    first_to_last = [fit_to_words(Sight(model, processor.tokenizer), processor, seed) for seed in (0, 0)]
    assert first_to_last[1] < first_to_last[0] < 1.2


@pytest.mark.usefixtures("few_steps")
def test_a_caption_comes_after_the_prefix_as_if_it_was_read_anew(backbone: Path) -> None:
    model, processor = assembled(backbone)
    sight, batch = Sight(model.eval(), processor.tokenizer), caption_batch(processor, seed=1)
    prefix = f"<|im_start|>system\n{FORM}<|im_end|>\n<|im_start|>user\n"
    before = processor.tokenizer([prefix] * 2, add_special_tokens=False, return_tensors="pt")
    whole = {name: torch.cat([before[name], batch[name]], dim=1) for name in before}
    labels = torch.cat([torch.full_like(before["input_ids"], -100), batch["labels"]], dim=1)
    with torch.no_grad():
        anew = model(**whole, labels=labels, pixel_values=batch["pixel_values"]).loss
        assert (sight(**batch).loss - anew).abs() < 1e-5
        assert (sight(**batch).loss - anew).abs() < 1e-5  # and once more: the prefix is as it was
