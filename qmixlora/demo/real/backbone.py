"""The real backbone: SmolLM2-135M-Instruct behind the embedded backbone's vision tower, joined by a new projector.

Tower and projector are trained on captions while the language model is frozen: first each image token is fitted to the
words of its cell (seconds), then the captions' loss goes through the language model (LLaVA's first stage, arXiv
2304.08485). There a fixed prefix shows it the form of a caption, so that the image has to tell what it shows and no
more: before the first step the loss is 1.6 with it and 3.7 without.

Shapes: B batch, C cells, S sequence, D width of the language model, H heads, P length of the prefix.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainingArguments,
)

from qmixlora.demo.backbone import (
    IMAGE_TOKENS,
    VERSION,
    first_held_out_scan,
    normalised,
    save_backbone,
    train_in_order,
)
from qmixlora.demo.scenes import CELL, GRID, Scene, draw_scene, sample_scene
from qmixlora.files import cache_folder, replacing
from qmixlora.training.checkpoints import last_checkpoint

from .english import caption, things
from .language_model import IMAGE_TOKEN, read_language_model

REAL_VERSION = 1  # part of the cache's name, beside the tower's: raise it with every change that changes the weights
WORD_STEPS, WORD_BATCH = 400, 128
CAPTION_STEPS, CAPTION_BATCH = 150, 16
FORM = (
    "You name the thing in each corner of a picture, like this: Top left: a large red circle. Bottom right: the digit "
    "3. Top right: the sign K T. Bottom left: a small blue ring. Or: Bottom left: the sign A Z. Top right: a small "
    "yellow square. Top left: the digit 8. Bottom right: a large purple cross."
)
SAVE_EVERY = 10  # steps; what is lost when making it is interrupted

Read = Callable[[], tuple[Any, Any]]


def real_backbone_folder() -> Path:
    """The cache folder of the real backbone."""
    return cache_folder() / f"real-backbone-v{VERSION}.{REAL_VERSION}"


def make_real_backbone(
    folder: Path,
    tower: Callable[[], Path],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    seed: int = 0,
    read: Read = read_language_model,
) -> Path:
    """The checkpoint folder of the real backbone, trained now if it is not there yet (some 20 minutes of CPU time).

    `tower` gives the folder of the embedded backbone, `read` the language model and its tokenizer. `on_progress` is
    told (steps done, steps in all). Where it was interrupted before, it goes on from the last of its own checkpoints,
    which lie beside `folder` until it is whole. The model is held in fp32, 0.6 GB on the disk.

    Raises:
        UserError: as `read`.
    """
    if (folder / "config.json").is_file():
        return folder
    language_model, tokenizer = read()
    model, processor = assemble(language_model, tokenizer, tower(), seed)
    scratch = folder.with_name(f"{folder.name}.training")
    sight = Sight(model, tokenizer)
    if last_checkpoint(scratch) is None:
        fit_to_words(sight, processor, seed)
    _train_on_captions(sight, processor, scratch, on_progress, seed)
    with replacing(folder, unless_there=True) as temporary:
        save_backbone(model, processor, temporary)
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


def assemble(
    language_model: Any, tokenizer: Any, tower_folder: Path, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a language model, the vision tower of another LLaVA and a new projector; and its processor."""
    from transformers import AutoProcessor

    seeing = AutoModelForImageTextToText.from_pretrained(tower_folder, dtype=torch.float32)
    config = LlavaConfig(
        vision_config=seeing.config.vision_config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = LlavaProcessor(
        image_processor=AutoProcessor.from_pretrained(tower_folder).image_processor,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


class Sight(nn.Module):
    """What is trained of a LLaVA, tower and projector, as a module of its own: a checkpoint holds nothing else."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        model.model.language_model.requires_grad_(False)
        self._model = (model,)  # in a tuple, so that its parameters are not ours
        before = tokenizer.apply_chat_template([{"role": "system", "content": FORM}], tokenize=False)
        prefix = tokenizer(f"{before}<|im_start|>user\n", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            self._prefix = model.model.language_model(**prefix, use_cache=True).past_key_values

    @property
    def model(self) -> LlavaForConditionalGeneration:
        return self._model[0]

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features as the language model reads them, B x C x D."""
        hidden = self.vision_tower(pixels_BCHW, output_hidden_states=True).hidden_states[-1]
        features_BCD: Tensor = self.projector(hidden[:, 1:])  # the first is the class token's
        return features_BCD

    def forward(self, attention_mask: Tensor, **batch: Tensor) -> Any:
        """The model's output after the prefix, whose keys and values are computed once."""
        size, cache = len(attention_mask), DynamicCache()
        for index, layer in enumerate(self._prefix.layers):
            keys_BHPD, values_BHPD = (kept.expand(size, -1, -1, -1) for kept in (layer.keys, layer.values))
            cache.update(keys_BHPD, values_BHPD, index)
        before_BP = attention_mask.new_ones(size, cache.get_seq_length())
        seen = torch.cat([before_BP, attention_mask], dim=1)
        return self.model(**batch, attention_mask=seen, past_key_values=cache, use_cache=True)


def fit_to_words(sight: Sight, processor: Any, seed: int) -> float:
    """Fit each image token to the mean embedding of the words of its cell; returns the last loss.

    A word's embedding is what the language model expects to read: from there on the captions go fast.
    """
    rng = random.Random(3 * seed + 1)
    embeddings_VD = cast(Tensor, sight.model.get_input_embeddings().weight).detach()
    optimizer = torch.optim.AdamW(sight.projector.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WORD_STEPS)
    loss = torch.zeros(())
    for _ in range(WORD_STEPS):
        scenes = [_training_scene(rng) for _ in range(WORD_BATCH)]
        pixels = normalised(processor.image_processor, [draw_scene(scene) for scene in scenes])
        with torch.no_grad():
            target_BCD = torch.stack([_word_means(scene, processor.tokenizer, embeddings_VD) for scene in scenes])
            scale = target_BCD.square().mean()
        loss = mse_loss(sight.features(pixels), target_BCD) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def _word_means(scene: Scene, tokenizer: Any, embeddings_VD: Tensor) -> Tensor:
    """The mean embedding of each cell's words, C x D."""
    named = things(scene)
    words = [tokenizer(f" {named[cell]}", add_special_tokens=False)["input_ids"] for cell in range(GRID * GRID)]
    return torch.stack([embeddings_VD[ids].mean(dim=0) for ids in words])


def _train_on_captions(
    sight: Sight, processor: Any, scratch: Path, on_progress: Callable[[int, int], None], seed: int
) -> None:
    rng = random.Random(3 * seed + 2)
    seeds = [rng.randrange(2**31) for _ in range(CAPTION_STEPS)]
    arguments = TrainingArguments(
        output_dir=str(scratch / "checkpoints"), max_steps=CAPTION_STEPS, per_device_train_batch_size=1,
        learning_rate=1e-3, warmup_steps=CAPTION_STEPS // 20, lr_scheduler_type="cosine", weight_decay=0.0, seed=seed,
        save_strategy="steps", save_steps=SAVE_EVERY,
        logging_strategy="no", disable_tqdm=True, report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    train_in_order(
        sight, arguments, seeds, lambda rows: caption_batch(processor, rows[0]), on_progress, last_checkpoint(scratch)
    )


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
