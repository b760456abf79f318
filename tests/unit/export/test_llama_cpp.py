"""LoRA files for llama.cpp: its own converter's tensors, one rank and one alpha, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qmixlora.errors import UserError
from qmixlora.export import llama_cpp
from qmixlora.export.llama_cpp import ARCHITECTURES, LlamaModel
from qmixlora.export.low_rank import LowRank
from tests.families.variant import variants

from .gguf_files import KINDS, RANK, converted, converter, digest_of, facts_of, made_up, tensors_of

pytest.importorskip("gguf", reason="the extra gguf is not installed")
# of the files that the converter of llama-cpp-python 0.3.36 made: python -m tests.unit.export.gguf_files
OF_THE_CONVERTER = {
    "llama": "eb0aa080d519ce67e0ea217a1920172b640d72f25f5cde9ba1e8ba61bd0b37a7",
    **dict.fromkeys(  # decoders of the same shapes, whose rows all stay where they are
        ("qwen2", "qwen2vl", "qwen3", "qwen3vl", "gemma3"),
        "1d74eac51a918f456a7196b91c6ccccc83f111777ceb85a04b6fbbdc37ae0806",
    ),
}


def written(architecture: str, path: Path) -> Path:
    config, updates = made_up(architecture)
    LlamaModel.of(config).write_lora(path, updates, "some task", "a name")
    return path


@pytest.mark.parametrize("architecture", KINDS)
def test_tensors_are_those_of_llama_cpps_converter(architecture: str, tmp_path: Path) -> None:
    file = written(architecture, tmp_path / "own.gguf")
    assert digest_of(file) == OF_THE_CONVERTER[architecture]
    facts = facts_of(file)
    assert (facts["general.architecture"], facts["general.type"]) == (architecture, "adapter")
    assert (facts["adapter.type"], facts["adapter.lora.task_name"]) == ("lora", "some task")
    assert facts["adapter.lora.alpha"] == RANK


@pytest.mark.long
@pytest.mark.skipif(converter() is None, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("architecture", KINDS)
def test_the_converter_that_is_installed_makes_the_same(architecture: str, tmp_path: Path) -> None:
    own, theirs = written(architecture, tmp_path / "own.gguf"), converted(architecture, tmp_path / "theirs")
    assert digest_of(own) == digest_of(theirs)
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [facts_of(own)[key] for key in keys] == [facts_of(theirs)[key] for key in keys]


def test_every_language_model_that_is_taken_is_compared() -> None:
    assert set(ARCHITECTURES.values()) == set(KINDS) == set(OF_THE_CONVERTER)


def test_layers_of_two_ranks_never_share_a_file(tmp_path: Path) -> None:
    """llama.cpp would apply one of them at another scale: it has one alpha, and divides by each tensor's own rank."""
    config, updates = made_up("llama")
    first = next(iter(updates))
    updates[first] = LowRank(torch.ones(1, updates[first].down_KI.shape[1]), torch.ones(len(updates[first].up_OK), 1))
    with pytest.raises(ValueError, match="One file has one rank"):
        LlamaModel.of(config).write_lora(tmp_path / "own.gguf", updates, "a", "a")
    assert not (tmp_path / "own.gguf").exists()


def test_a_scaling_goes_into_the_alpha_and_leaves_the_tensors(tmp_path: Path) -> None:
    config, updates = made_up("llama")
    LlamaModel.of(config).write_lora(tmp_path / "own.gguf", updates, "a", "a", scaling=0.5)
    assert facts_of(tmp_path / "own.gguf")["adapter.lora.alpha"] == 0.5 * RANK
    assert digest_of(tmp_path / "own.gguf") == OF_THE_CONVERTER["llama"]
    assert len(tensors_of(tmp_path / "own.gguf")) == 2 * len(updates)


@pytest.mark.parametrize("name", ["glm4v", "gemma4", "qwen3_5", "mistral3"])
def test_other_language_models_are_refused_by_name(name: str) -> None:
    config, _ = variants()[name].build()
    with pytest.raises(UserError, match=repr(config.get_text_config().model_type)):
        LlamaModel.of(config)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="need the package gguf") as error:
        LlamaModel.of(variants()["llava"].build()[0])
    assert "qmixlora[gguf]" in (error.value.fix or "")


@pytest.mark.parametrize(("name", "words"), [("qwen3_vl", "--mmproj"), ("llava", "llava with clip_vision_model")])
def test_a_model_with_or_without_a_file_for_images_is_told_by_name(name: str, words: str) -> None:
    assert words in llama_cpp.note_on_images(variants()[name].build()[0])


def test_a_layer_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    model = LlamaModel.of(AutoConfig.for_model("llama", num_hidden_layers=2))
    updates = {"model.layers.0.self_attn.odd_proj": LowRank(torch.ones(1, 4), torch.ones(4, 1))}
    with pytest.raises(UserError, match="no place for an update of model"):
        model.write_lora(tmp_path / "own.gguf", updates, "a", "a")
