"""The real backbone: SmolLM2-135M-Instruct behind a small vision tower and projector, which are trained here.

The language model is frozen. First an image learns to read as words: every cell has four image tokens, and each is
fitted to the embedding of one word of what stands there, `a large red circle` (minutes, without the language model).
Then the captions' loss goes through the language model (LLaVA's first stage, arXiv 2304.08485). There a fixed prefix
shows it the form of a caption, so that the image has to tell what it shows and no more.

Shapes: B batch, C image tokens, N words that are known, S sequence, D width of the language model, H heads, P length of
the prefix.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainingArguments,
)

from qmixlora.demo.backbone import (
    first_held_out_scan,
    make_image_processor,
    normalised,
    save_backbone,
    train_in_order,
)
from qmixlora.demo.scenes import CELL, GRID, IMAGE_SIZE, Scene, draw_scene, sample_scene
from qmixlora.device import default_device
from qmixlora.files import cache_folder, replacing
from qmixlora.training.checkpoints import last_checkpoint

from .english import caption, things
from .language_model import IMAGE_TOKEN, read_language_model

REAL_VERSION = 3  # part of the cache's name: raise it with every change that changes the weights
PATCH = CELL // 2
WORDS = 4  # of a cell, one for each of its patches
IMAGE_TOKENS = GRID * GRID * WORDS
WORD_STEPS, WORD_BATCH = 1500, 128
CAPTION_STEPS, CAPTION_BATCH = 80, 16
CAPTION_WORTH = 12  # steps of words that take as long as one of captions
SAVED = 15  # times in a training; what is lost when it is interrupted is a part of so many
SHARP = 10.0  # how much likelier a word is that is nearer by the mean square of an embedding, as a logarithm
FORM = (
    "You name the thing in each corner of a picture, like this: Top left: a large red circle. Bottom right: the digit "
    "3. Top right: the sign K T. Bottom left: a small blue ring. Or: Bottom left: the sign A Z. Top right: a small "
    "yellow square. Top left: the digit 8. Bottom right: a large purple cross."
)

Read = Callable[[], tuple[Any, Any]]


def real_backbone_folder() -> Path:
    """The cache folder of the real backbone."""
    return cache_folder() / f"real-backbone-v{REAL_VERSION}"


def make_real_backbone(
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    seed: int = 0,
    read: Read = read_language_model,
) -> Path:
    """The checkpoint folder of the real backbone, trained now if it is not there yet (some 20 minutes of CPU time).

    `read` gives the language model and its tokenizer. `on_progress` is told (steps done, steps in all). Where it was
    interrupted before, it goes on from the last of its own checkpoints, which lie beside `folder` until it is whole.
    The model is held in fp32, 0.6 GB on the disk.

    Raises:
        UserError: as `read`.
    """
    if (folder / "config.json").is_file():
        return folder
    model, processor = assemble(*read(), seed)
    cast(nn.Module, model).to(default_device())
    tokenizer, scratch = processor.tokenizer, folder.with_name(f"{folder.name}.training")
    total = WORD_STEPS + CAPTION_WORTH * CAPTION_STEPS

    def tell_words(done: int, _: int) -> None:
        on_progress(done, total)

    def tell_captions(done: int, _: int) -> None:
        on_progress(WORD_STEPS + CAPTION_WORTH * done, total)

    words, captions = partial(word_batch, processor), partial(caption_batch, processor)
    _train(Words(model, tokenizer), words, WORD_STEPS, 2e-3, scratch / "words", tell_words, seed)
    _train(Captions(model, tokenizer), captions, CAPTION_STEPS, 5e-4, scratch / "captions", tell_captions, seed + 1)
    with replacing(folder, unless_there=True) as temporary:
        save_backbone(model, processor, temporary)
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


def assemble(language_model: Any, tokenizer: Any, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a language model, a new CLIP tower of three layers and a new projector; and its processor."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            image_size=IMAGE_SIZE, patch_size=PATCH,
        ),
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight)  # as large as a patch
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = LlavaProcessor(
        image_processor=make_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


class Sight(nn.Module):
    """What is trained of a LLaVA, tower and projector, as a module of its own: a checkpoint holds nothing else."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        model.model.language_model.requires_grad_(False)


class Words(Sight):
    """Fits image tokens to words' embeddings, which is what the language model expects to read."""

    known_N: Tensor
    embeddings_ND: Tensor

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__(model)
        rng = random.Random(0)
        known_N = sorted({word for _ in range(400) for word in words_of(_training_scene(rng), tokenizer)})
        embeddings_VD = cast(Tensor, model.get_input_embeddings().weight).detach()
        self.register_buffer("known_N", torch.tensor(known_N), persistent=False)
        self.register_buffer("embeddings_ND", embeddings_VD[known_N], persistent=False)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features as the language model reads them, B x C x D."""
        hidden = self.vision_tower(pixels_BCHW, output_hidden_states=True).hidden_states[-1]
        features_BCD: Tensor = self.projector(hidden[:, 1:])  # the first is the class token's
        return features_BCD

    def distances(self, features_BCD: Tensor) -> Tensor:
        """Squared distances from every word that is known, in mean squares of an embedding, B x C x N."""
        scale = self.embeddings_ND.square().sum(dim=-1).mean()
        return torch.cdist(features_BCD, self.embeddings_ND[None]).square() / scale

    def forward(self, pixel_values: Tensor, words_BC: Tensor) -> dict[str, Tensor]:
        """The distance from the right words, and how much likelier by their distances are others."""
        distances_BCN = self.distances(self.features(pixel_values))
        right_BC = torch.searchsorted(self.known_N, words_BC)
        loss = cross_entropy(-SHARP * distances_BCN.flatten(0, 1), right_BC.flatten())
        return {"loss": loss + distances_BCN.gather(2, right_BC[..., None]).mean()}


class Captions(Sight):
    """Has the language model say what stands in an image, after a prefix whose keys and values are computed once."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__(model)
        self._model = (model,)  # in a tuple, so that its parameters are not ours
        before = tokenizer.apply_chat_template([{"role": "system", "content": FORM}], tokenize=False)
        prefix = tokenizer(f"{before}<|im_start|>user\n", add_special_tokens=False, return_tensors="pt").to(
            model.device
        )
        with torch.no_grad():
            self._prefix = model.model.language_model(**prefix, use_cache=True).past_key_values

    def forward(self, attention_mask: Tensor, **batch: Tensor) -> Any:
        """The model's output after the prefix."""
        size, cache = len(attention_mask), DynamicCache()
        for index, layer in enumerate(self._prefix.layers):
            keys_BHPD, values_BHPD = (kept.expand(size, -1, -1, -1) for kept in (layer.keys, layer.values))
            cache.update(keys_BHPD, values_BHPD, index)
        before_BP = attention_mask.new_ones(size, cache.get_seq_length())
        seen = torch.cat([before_BP, attention_mask], dim=1)
        return self._model[0](**batch, attention_mask=seen, past_key_values=cache, use_cache=True)


def _train(
    sight: Sight,
    batch: Callable[[int], dict[str, Tensor]],
    steps: int,
    learning_rate: float,
    scratch: Path,
    on_progress: Callable[[int, int], None],
    seed: int,
) -> None:
    """Train on the batches of so many seeds, or go on from where it stopped; nothing where it has ended before."""
    ended = scratch / "ended.safetensors"
    if ended.is_file():
        sight.load_state_dict(load_file(ended))
        return
    rng = random.Random(seed)
    seeds = [rng.randrange(2**31) for _ in range(steps)]
    arguments = TrainingArguments(
        output_dir=str(scratch / "checkpoints"), max_steps=steps, per_device_train_batch_size=1,
        learning_rate=learning_rate, warmup_steps=steps // 20, lr_scheduler_type="cosine", weight_decay=0.0, seed=seed,
        save_strategy="steps", save_steps=max(1, steps // SAVED),
        logging_strategy="no", disable_tqdm=True, report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    train_in_order(sight, arguments, seeds, lambda own: batch(own[0]), on_progress, last_checkpoint(scratch))
    with replacing(ended) as temporary:
        save_file(sight.state_dict(), temporary)


def word_batch(processor: Any, seed: int) -> dict[str, Tensor]:
    """The images that a seed stands for, and the words that their tokens are fitted to (B x C)."""
    rng = random.Random(seed)
    scenes = [_training_scene(rng) for _ in range(WORD_BATCH)]
    pixels = normalised(processor.image_processor, [draw_scene(scene) for scene in scenes])
    return {
        "pixel_values": pixels,
        "words_BC": torch.tensor([words_of(scene, processor.tokenizer) for scene in scenes]),
    }


def words_of(scene: Scene, tokenizer: Any) -> list[int]:
    """The tokens of what stands in each cell, the cells in reading order."""
    named = things(scene)
    texts = [f" {named[cell]}" for cell in range(GRID * GRID)]
    return [word for text in texts for word in tokenizer(text, add_special_tokens=False)["input_ids"][-WORDS:]]


def caption_batch(processor: Any, seed: int) -> dict[str, Tensor]:
    """The batch of captions that a seed stands for: the image and its caption as a chat, from the user's turn on, with
    labels on the captions.
    """
    rng = random.Random(seed)
    scenes = [_training_scene(rng) for _ in range(CAPTION_BATCH)]
    tokenizer = processor.tokenizer
    before = IMAGE_TOKEN * IMAGE_TOKENS + "\n<|im_end|>\n<|im_start|>assistant\n"
    texts = [f"{before}{caption(scene, rng)}{tokenizer.eos_token}" for scene in scenes]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    labels_BS = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels_BS[:, : len(tokenizer(before, add_special_tokens=False)["input_ids"])] = -100
    pixels = normalised(processor.image_processor, [draw_scene(scene) for scene in scenes])
    return {**batch, "pixel_values": pixels, "labels": labels_BS}


def _training_scene(rng: random.Random) -> Scene:
    return sample_scene(rng, range(first_held_out_scan()))
