"""What pictures take, by family: against the real processors, and in a real step of tiny models.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from qmixlora.backbone import find_anatomy
from qmixlora.backbone.image_tokens import FAMILIES, largest_images, limit_image_tokens
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_model, open_session

PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ["<fake_token_around_image>", "<global-img>", *PLACES, "<start>", "<end>", "\n", "\n\n", "word"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
IMAGE = 60  # the id of image tokens in every tiny model


def tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Every mark is one token; `special` are named as the family's processor asks for them, the image token first."""
    words = ["<pad>", "<bos>", *MARKS]
    words += [f"<unused_{index}>" for index in range(len(words), IMAGE)] + list(special.values())
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", extra_special_tokens=special
    )
    fast.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    return fast


def pictures_only(processor: type) -> type:
    """The processor without the videos' part, which needs torchvision and which no picture reaches."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else processor.check_argument_for_proper_class(self, name, argument)

    return type(processor.__name__, (processor,), {"check_argument_for_proper_class": check})


def text_config(kind: str = "", **more: Any) -> dict[str, Any]:
    named = {"model_type": kind} if kind else {}
    return {
        **named, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 70, "head_dim": 16, "rope_parameters": ROPE, "pad_token_id": 0, **more,
    }  # fmt: skip


def vision_config(kind: str, size: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": size, "patch_size": patch, **more,
    }  # fmt: skip


def llava() -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["llava"](
        text_config=text_config("llama"), vision_config=vision_config("clip_vision_model", 28, 7),
        image_token_index=IMAGE,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer({"image_token": "<image>"}), patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


def llava_onevision() -> tuple[PretrainedConfig, Any]:
    """Tiles of 28 pixels and 4 x 4 features, up to 4 x 4 tiles; what is over 5 tiles is scaled down."""
    pinpoints = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = CONFIG_MAPPING["llava_onevision"](
        text_config=text_config("qwen2"), image_token_index=IMAGE, video_token_index=IMAGE + 1,
        vision_config=vision_config("siglip_vision_model", 28, 7, vision_use_head=False),
        image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip
    processor = pictures_only(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints),
        tokenizer({"image_token": "<image>", "video_token": "<video>"}), None,
        num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip
    return config, processor


def qwen(kind: str, processor: type, patch: int, vision: dict[str, Any]) -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING[kind](
        text_config=text_config(rope_parameters={**ROPE, "mrope_section": [4, 2, 2]}),
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": patch, **vision,
        },
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=2, vision_end_token_id=3,
    )  # fmt: skip
    names = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    return config, pictures_only(processor)(Qwen2VLImageProcessorPil(patch_size=patch), names, None)


def gemma3() -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["gemma3"](
        text_config=text_config(rope_parameters=None),
        vision_config=vision_config("siglip_vision_model", 28, 7, vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
    )  # fmt: skip
    names = tokenizer({"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "</image>"})
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return config, Gemma3Processor(images, names, image_seq_length=4)


def internvl() -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["internvl"](
        text_config=text_config("qwen2"), vision_config=vision_config("internvl_vision", 28, 7),
        image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    names = {
        "context_image_token": "<image>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>",
    }  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    return config, pictures_only(InternVLProcessor)(images, tokenizer(names), None, image_seq_length=4)


def idefics3(kind: str) -> tuple[PretrainedConfig, Any]:
    """SmolVLM's own processor needs num2words, for videos; for pictures it writes what Idefics3's does."""
    config = CONFIG_MAPPING[kind](
        text_config=text_config("llama"), vision_config=vision_config(f"{kind}_vision", 28, 7),
        image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip
    images = SmolVLMImageProcessorPil(size={"longest_edge": 4 * 28}, max_image_size={"longest_edge": 28})
    return config, Idefics3Processor(images, tokenizer({"image_token": "<image>"}), image_seq_len=4)


MAKERS: dict[str, Callable[[], tuple[PretrainedConfig, Any]]] = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl", Qwen2_5_VLProcessor, 14, {"fullatt_block_indexes": [1]}),
    "qwen3_vl": lambda: qwen("qwen3_vl", Qwen3VLProcessor, 16, {"deepstack_visual_indexes": [0]}),
    "gemma3": gemma3,
    "internvl": internvl,
    "idefics3": lambda: idefics3("idefics3"),
    "smolvlm": lambda: idefics3("smolvlm"),
}
CASES = [  # family, budget, the most image tokens of a picture, height and width of one that has as many
    ("llava", None, 16, (50, 70)),
    ("llava", 16, 16, (50, 70)),
    ("llava_onevision", None, 128, (112, 42)),  # 16 for the whole; 16 x 6, not over 1.1 x 5 tiles; 16 new lines
    ("llava_onevision", 60, 56, (56, 28)),
    ("llava_onevision", 36, 36, (50, 50)),
    ("qwen2_5_vl", 35, 35, (5 * 28, 7 * 28)),
    ("qwen2_5_vl", 34, 33, (3 * 28, 11 * 28)),
    ("qwen3_vl", 35, 35, (5 * 32, 7 * 32)),
    ("gemma3", None, 4, (50, 70)),
    ("gemma3", 4, 4, (50, 70)),
    ("internvl", None, 13 * 4, (28, 12 * 28)),
    ("internvl", 20, 5 * 4, (4 * 28, 28)),
    ("internvl", 11, 4, (50, 70)),  # two tiles would come with a third
    ("idefics3", None, 17 * 4, (112, 112)),
    ("smolvlm", 20, 5 * 4, (80, 80)),
    ("smolvlm", 19, 4, (80, 80)),
]


def draw(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def process(processor: Any, shape: tuple[int, int], rows: int = 2) -> dict[str, Any]:
    """What the real processor makes of samples with a picture of this height and width and three words."""
    mark = "<start> <image> <end>" if "Qwen" in type(processor).__name__ else "<image>"
    pictures = [[draw(*shape)] for _ in range(rows)]
    return dict(processor(text=[f"word {mark} word word"] * rows, images=pictures, return_tensors="pt", padding=True))


def image_tokens(inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"][0] == IMAGE).sum())


@pytest.mark.parametrize(("family", "budget", "most", "shape"), CASES)
def test_the_largest_picture_is_what_the_processor_gives(
    family: str, budget: int | None, most: int, shape: tuple[int, int]
) -> None:
    config, processor = MAKERS[family]()
    limit_image_tokens(processor, config, budget)
    real = process(processor, shape)
    assert image_tokens(real) == most
    length = real["input_ids"].shape[1]
    ids_BS, tensors = largest_images(config, 2, length + 7, budget)
    made = {"input_ids": ids_BS[:, :length], **tensors}
    if "mm_token_type_ids" in made or "token_type_ids" in made:
        name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        assert made[name].shape == ids_BS.shape
        made[name] = made[name][:, :length]
        assert torch.equal(made[name], real[name])
    assert made.keys() == real.keys() - {"attention_mask"}
    for name, tensor in made.items():
        assert tensor.shape == real[name].shape and tensor.dtype == real[name].dtype, name
        if name not in {"input_ids", "pixel_values", "image_sizes"}:
            assert torch.equal(tensor, real[name]), name
    assert torch.equal(made["input_ids"] == IMAGE, real["input_ids"] == IMAGE)


@pytest.mark.parametrize(("family", "budget", "most", "shape"), CASES)
def test_a_model_takes_a_step_on_the_largest_picture(
    family: str, budget: int | None, most: int, shape: tuple[int, int]
) -> None:
    """transformers compares the image tokens with the features; the gradient arrives in the projector."""
    config, _ = MAKERS[family]()
    limit_image_tokens(None, config, budget)
    ids_BS, tensors = largest_images(config, 2, most + 60, budget)
    if config.model_type not in {"idefics3", "smolvlm"}:  # there, what stands in the batch is enough
        tensors["pixel_values"].normal_()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    loss = model(input_ids=ids_BS, labels=ids_BS, **tensors).loss
    loss.backward()
    projector = model.get_submodule(find_anatomy(model).projectors[0])
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in projector.parameters())


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        *((family, None) for family in ("llava_onevision", "internvl", "idefics3")),
        *(("llava_onevision", budget) for budget in (36, 60, 61, 90, 110)),
        *(("internvl", budget) for budget in (4, 8, 12, 17, 40)),
        *(("smolvlm", budget) for budget in (4, 20, 45, 60)),
        *((family, budget) for family in ("qwen2_5_vl", "qwen3_vl") for budget in (4, 15, 40)),
    ],
)
def test_no_picture_takes_more_than_the_largest(family: str, budget: int | None) -> None:
    config, processor = MAKERS[family]()
    limit_image_tokens(processor, config, budget)
    most = image_tokens({"input_ids": largest_images(config, 1, 600, budget)[0]})
    assert budget is None or most <= budget
    draws = np.random.default_rng(0)
    found = []
    while len(found) < 60:
        shape = tuple(int(edge) for edge in np.exp(draws.uniform(np.log(8), np.log(400), 2)))
        if budget is None or max(shape) / min(shape) <= budget:
            found.append(image_tokens(process(processor, shape, rows=1)))
    assert max(found) <= (budget if family.startswith("qwen") else most)
    assert max(found) > 0.5 * most


def test_a_limit_is_kept_when_it_is_lower_already() -> None:
    config, processor = internvl()
    processor.image_processor.max_patches = 3
    limit_image_tokens(processor, config, 40)
    assert processor.image_processor.max_patches == 3
    config, processor = idefics3("smolvlm")
    processor.image_processor.size = {"longest_edge": 28}
    limit_image_tokens(processor, config, 68)
    assert processor.image_processor.size["longest_edge"] == 28
    config, processor = MAKERS["qwen3_vl"]()
    processor.image_processor.size = {"longest_edge": 5000, "shortest_edge": 100}
    limit_image_tokens(processor, config, 68)
    assert dict(processor.image_processor.size) == {"longest_edge": 5000, "shortest_edge": 100}


def test_limited_twice_is_limited_once_and_without_a_budget_nothing_changes() -> None:
    for make in MAKERS.values():
        config, processor = make()
        before = config.to_dict(), processor.image_processor.to_dict()
        limit_image_tokens(processor, config, None)
        assert (config.to_dict(), processor.image_processor.to_dict()) == before
        once = []
        for _ in range(2):
            limit_image_tokens(processor, config, 40)
            once.append((config.to_dict(), processor.image_processor.to_dict()))
        assert once[0] == once[1]


def test_a_square_of_half_the_sample_where_pictures_keep_their_size() -> None:
    ids_BS, tensors = largest_images(MAKERS["qwen2_5_vl"]()[0], 2, 100, None)
    assert (ids_BS == IMAGE).sum() == 2 * 49 and tensors["image_grid_thw"].tolist() == [[1, 14, 14]] * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Idefics3: of the families with tiles the one whose processor loads without torchvision."""
    folder = tmp_path_factory.mktemp("idefics3")
    config, processor = idefics3("idefics3")
    processor.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("opened", [lambda recipe: open_session(recipe, []), open_model])
def test_a_recipe_keeps_pictures_small(
    checkpoint: Path, tmp_path: Path, opened: Callable[[Recipe], Session], make_recipe: Callable[..., Recipe]
) -> None:
    draw(112, 112).save(tmp_path / "large.png")
    turns = [{"role": "user", "text": "<image> word"}, {"role": "assistant", "text": "word word"}]
    row = {"turns": turns, "images": [{"path": str(tmp_path / "large.png"), "bytes": None}], "task": "all"}
    model = {"id": str(checkpoint), "quantization": "none"}
    for budget, most in {None: 68, 25: 20}.items():
        recipe = make_recipe(model=model, data={"max_image_tokens": budget})
        assert image_tokens(opened(recipe).collator([row])) == most
    with pytest.raises(UserError, match="at least 4 tokens in this model"):
        opened(make_recipe(model=model, data={"max_image_tokens": 3}))


def test_mistakes() -> None:
    for family, smallest in {"llava": 16, "llava_onevision": 36, "gemma3": 4, "internvl": 4, "smolvlm": 4}.items():
        config, processor = MAKERS[family]()
        for call in (
            lambda c=config, p=processor, s=smallest: limit_image_tokens(p, c, s - 1),
            lambda c=config, s=smallest: largest_images(c, 1, 500, s - 1),
        ):
            with pytest.raises(UserError, match=f"at least {smallest} tokens in this model; .* to {smallest - 1}") as e:
                call()
            assert e.value.where == "data.max_image_tokens" and f"{smallest} or more" in str(e.value.fix)
    with pytest.raises(UserError, match="20 tokens do not hold a picture of 54 and a question") as error:
        largest_images(internvl()[0], 1, 20, None)
    assert "at least 58, or set data.max_image_tokens (at least 4 here)" in str(error.value.fix)
    with pytest.raises(UserError, match="a picture of 16") as error:
        largest_images(llava()[0], 1, 19, None)
    assert error.value.fix == "Plan with at least 20."
    other = CONFIG_MAPPING["llava"](vision_config={"model_type": "pixtral"})
    for call in (lambda: limit_image_tokens(None, other, 100), lambda: largest_images(other, 1, 500, None)):
        with pytest.raises(UserError, match="'pixtral' models take is not known"):
            call()
    limit_image_tokens(None, CONFIG_MAPPING["blip-2"](), None)
    assert set(MAKERS) | {"qwen2_vl"} == set(FAMILIES)
