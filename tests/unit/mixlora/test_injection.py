"""Putting the method into models: what it does not fit is refused, and leaves them as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qmixlora.mixlora import MixLoraConfig, MixLoraLayer
from qmixlora.session import Session

from .helpers import layers, randomize_with_centers

IDS = torch.arange(2, 14).view(2, 6)


def plain() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapter(*targets: str, **more: Any) -> MixLoraConfig:
    return MixLoraConfig(num_factors=8, r=2, target_modules=list(targets), **more)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=IDS).logits
    return made


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (adapter("q_proj", "norm"), "MixLoRA adapts nn.Linear"),
        (adapter("q_porj"), "not found"),
        (adapter("q_proj", static_modules=["q_proj"]), "nothing would be routed"),
        (adapter("q_proj", "o_proj", static_modules=["0_proj"]), "static_modules: 0_proj: no target module"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(config: MixLoraConfig, error: str, tmp_path: Path) -> None:
    model = plain()
    expected, names = logits_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=error):
        get_peft_model(model, config)
    assert torch.equal(logits_of(model), expected) and [name for name, _ in model.named_modules()] == names
    then = get_peft_model(model, adapter("q_proj", "v_proj")).eval()
    randomize_with_centers(then)
    then.save_pretrained(tmp_path)
    assert torch.equal(logits_of(then), logits_of(PeftModel.from_pretrained(plain(), str(tmp_path))))


def test_a_second_adapter_that_does_not_fit_leaves_the_first() -> None:
    model = get_peft_model(plain(), adapter("q_proj")).eval()
    randomize_with_centers(model)
    expected = logits_of(model)
    with pytest.raises(ValueError, match="not found"):
        model.add_adapter("second", adapter("q_porj"))
    assert torch.equal(logits_of(model), expected)


def test_a_model_that_is_wrapped_again_begins_anew(tmp_path: Path) -> None:
    """As when a cell of a notebook is run twice."""
    base = plain()
    expected = logits_of(base)
    first = get_peft_model(base, adapter("q_proj", "o_proj"))
    randomize_with_centers(first)
    with pytest.warns(UserWarning, match="They were taken off"):
        second = get_peft_model(base, adapter("q_proj", "v_proj")).eval()
    assert torch.equal(logits_of(second), expected)
    assert len(layers(second)) == 4 and all(layer in second.base_model.mixlora_layers for layer in layers(second))
    randomize_with_centers(second)
    second.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="They were taken off"):
        third = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(logits_of(third), logits_of(PeftModel.from_pretrained(plain(), str(tmp_path))))


def test_an_unloaded_model_is_the_plain_one_again() -> None:
    base = plain()
    expected, generate = logits_of(base), base.generate
    model = get_peft_model(base, adapter("q_proj"))
    randomize_with_centers(model)
    unloaded = model.unload()
    assert torch.equal(logits_of(unloaded), expected) and unloaded.generate == generate
    assert not any(isinstance(module, MixLoraLayer) for module in unloaded.modules())


def test_models_with_an_encoder_for_the_prompt_are_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder of its own"):
        get_peft_model(T5ForConditionalGeneration(config), adapter("q", "v"))


def test_an_adapter_of_a_later_format_is_refused(tmp_path: Path) -> None:
    get_peft_model(plain(), adapter("q_proj")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match="its format is 2, and this release knows 1; upgrade qmixlora"):
        PeftModel.from_pretrained(plain(), str(tmp_path))


def test_the_last_selection_is_of_the_layers_that_the_adapter_is_on() -> None:
    model = get_peft_model(plain(), adapter("q_proj", "v_proj"))
    model.add_adapter("narrow", adapter("q_proj"))
    model.set_adapter("narrow")
    logits_of(model)
    assert model.base_model.last_selection().shape[:2] == (2, 2)


class TestLayersThatReadImages:
    """The vision tower's, where names of targets occur there, too."""

    @pytest.fixture
    def adapted(self, session: Session) -> Any:
        model = get_peft_model(session.model.unload(), MixLoraConfig(target_modules=["q_proj", "v_proj"]))
        randomize_with_centers(model)
        return model.eval()

    @staticmethod
    def inputs(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def test_one_image_of_each_sample_is_routed_as_its_sample(self, adapted: Any, batch: dict[str, Any]) -> None:
        together = self.inputs(batch)
        with torch.no_grad():
            made = adapted(**together).logits
            for row in range(len(made)):
                alone = adapted(**{name: value[row : row + 1] for name, value in together.items()}).logits
                torch.testing.assert_close(alone[0], made[row], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("images", [(0, 2), (1, 3), (2, 1)])
    def test_other_numbers_of_images_are_refused(
        self, adapted: Any, batch: dict[str, Any], images: tuple[int, int]
    ) -> None:
        together, image = self.inputs(batch), adapted.config.image_token_id
        ids_S = together["input_ids"][0]
        image_X, text_X = ids_S[ids_S == image], ids_S[ids_S != image]
        rows = [torch.cat([image_X.repeat(count), text_X]) for count in images]
        width = max(map(len, rows))
        mask_BS = torch.stack([torch.arange(width) < len(row) for row in rows]).long()
        ids_BS = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
        pixels = together["pixel_values"][:1].repeat(sum(images), 1, 1, 1)
        with torch.no_grad(), pytest.raises(ValueError, match="A target layer reads images"):
            adapted(input_ids=ids_BS, attention_mask=mask_BS, pixel_values=pixels)

    def test_a_batch_of_text_alone_needs_none(self, adapted: Any) -> None:
        with torch.no_grad():
            adapted(input_ids=IDS)
