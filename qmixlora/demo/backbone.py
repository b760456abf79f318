"""The embedded backbone: a LLaVA of one million parameters with a real processor, trained from scratch on captions.

It is an ordinary checkpoint folder (config, safetensors, tokenizer, image processor, chat template), which the rest of
the project loads like any other model.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qmixlora.device import make_room
from qmixlora.export.checkpoint import take_hub_names
from qmixlora.files import cache_folder, replacing
from qmixlora.training.checkpoints import SealedCheckpoints

from .dataset import SCANS
from .scenes import CELL, GRID, IMAGE_SIZE, digit_scans, draw_scene, sample_scene
from .tasks import HELD_OUT, TASKS, caption, caption_cell

VERSION = 2  # part of the cache's name: raise it with every change that changes the weights
SEED = 0
CELL_STEPS, SCENE_STEPS = 160, 640  # one thing per image first, so that pixels get words; then whole scenes
CELL_BATCH, SCENE_BATCH = 96, 32
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'assistant' %}assistant : {% else %}{{ message.role }} : {% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %} "
    "{% endfor %}{% if message.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
IMAGE_TOKENS = GRID * GRID


def backbone_folder() -> Path:
    """The cache folder of the embedded backbone."""
    return cache_folder() / f"embedded-backbone-v{VERSION}"


def make_backbone(
    folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None, seed: int = SEED
) -> Path:
    """The checkpoint folder of the embedded backbone, trained now if it is not there yet (about a minute on two cores).

    `on_progress` is told (steps done, steps in all). The same seed gives the same weights on the same machine.
    """
    if (folder / "config.json").is_file():
        return folder
    with replacing(folder, unless_there=True) as temporary:
        _train_and_save(temporary, on_progress, seed)
    return folder


def _train_and_save(folder: Path, on_progress: Callable[[int, int], None], seed: int) -> None:
    processor = make_processor()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config(processor.tokenizer))
    positions = model.model.vision_tower.embeddings.position_embedding
    torch.nn.init.normal_(positions.weight)  # as large as a patch: places are learned as fast as colours
    with tempfile.TemporaryDirectory() as scratch:
        _train_on_captions(model, processor, Path(scratch), on_progress, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    save_backbone(model, processor, folder)


def save_backbone(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save a model and its processor as an ordinary checkpoint, whose tensors have the names that servers know."""
    model.save_pretrained(folder)
    take_hub_names(folder, model)
    processor.save_pretrained(folder)


def make_processor() -> LlavaProcessor:
    """A LlavaProcessor with a word-level tokenizer that knows every word of captions and tasks."""
    return processor_of(sorted(_words()))


def processor_of(words: Iterable[str]) -> LlavaProcessor:
    """A LlavaProcessor with a word-level tokenizer that knows these words."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with blanks
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=make_image_processor(),
        tokenizer=fast,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_image_processor() -> CLIPImageProcessor:
    """An image processor of scenes' size."""
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def make_config(tokenizer: Any, layers: int = 4, width: int = 128) -> LlavaConfig:
    """The architecture: a CLIP tower of one layer, a two-layer projector, a LLaMA decoder (2.5 times as wide inside, in
    whole NF4 blocks of 64).
    """
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4,
            image_size=IMAGE_SIZE, patch_size=CELL,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
            intermediate_size=-(-5 * width // 128) * 64,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def _words() -> set[str]:
    """Every word that captions, questions and answers can use, found by making many of them."""
    rng = random.Random(SEED)
    words = {"user", "assistant", "system", ":"}
    for _ in range(2000):
        scene = sample_scene(rng, range(len(digit_scans()[1])))
        texts = [caption(scene, rng), *(caption_cell(scene, cell) for cell in range(GRID * GRID))]
        texts += [text for task in (*TASKS, *HELD_OUT) for text in task.ask(scene, rng)]
        words.update(word for text in texts for word in text.split())
    return words


def _train_on_captions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scratch: Path,
    on_progress: Callable[[int, int], None],
    seed: int,
) -> None:
    """Whole-model training in fp32: single things first, then scenes; loss on the caption."""
    total = CELL_STEPS + SCENE_STEPS
    cells = _captions(CELL_STEPS * CELL_BATCH, single=True, seed=seed)
    scenes = _captions(SCENE_STEPS * SCENE_BATCH, single=False, seed=seed)
    batches = [cells[i : i + CELL_BATCH] for i in range(0, len(cells), CELL_BATCH)]
    batches += [scenes[i : i + SCENE_BATCH] for i in range(0, len(scenes), SCENE_BATCH)]

    arguments = TrainingArguments(
        output_dir=str(scratch), max_steps=total, per_device_train_batch_size=1, learning_rate=1.5e-3,
        warmup_steps=40, lr_scheduler_type="cosine", weight_decay=0.01, seed=seed, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    train_in_order(model, arguments, batches, lambda rows: _caption_batch(processor, rows[0]), on_progress)


def train_in_order(
    model: torch.nn.Module,
    arguments: TrainingArguments,
    batches: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    on_progress: Callable[[int, int], None],
    checkpoint: Path | None = None,
) -> None:
    """Train on ready-made batches in their order, which is the curriculum, from a checkpoint on where there is one.

    `on_progress` is told (steps done, steps in all). The newest checkpoint alone is kept.
    """

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_progress(state.global_step, args.max_steps)

    make_room()
    arguments._n_gpu = min(1, arguments.n_gpu)  # a batch for every GPU would leave out all but the first
    trainer = _InOrderTrainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, batches),
        data_collator=collate,
        callbacks=[Report(), SealedCheckpoints(keep=1)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


class _InOrderTrainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(cast(Any, self.train_dataset))


def _captions(count: int, *, single: bool, seed: int) -> list[tuple[Any, str]]:
    """(image, caption) pairs; images are drawn 8,000 at most and captioned anew each time."""
    rng = random.Random(2 * seed + single)
    drawn = []
    for _ in range(min(count, 8000)):
        scene, cell = sample_scene(rng, range(first_held_out_scan())), rng.randrange(GRID * GRID)
        drawn.append((draw_scene(scene, cell if single else None), scene, cell))
    picked = (drawn[index % len(drawn)] for index in range(count))
    return [(image, caption_cell(scene, cell) if single else caption(scene, rng)) for image, scene, cell in picked]


def first_held_out_scan() -> int:
    """Digit scans from here on are kept for validation and test images: nobody trains on their handwriting."""
    return int(SCANS["train"][1] * len(digit_scans()[1]))


def _caption_batch(processor: LlavaProcessor, rows: list[tuple[Any, str]]) -> dict[str, Tensor]:
    """A batch as `processor(images=..., text=...)` gives it, with labels on the caption."""
    texts = ["<image>" * IMAGE_TOKENS + f" {text} <eos>" for _, text in rows]
    batch = processor.tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, : 1 + IMAGE_TOKENS] = -100
    pixels = normalised(processor.image_processor, [image for image, _ in rows])
    return {**batch, "pixel_values": pixels, "labels": labels}


def normalised(image_processor: Any, images: Sequence[Any]) -> Tensor:
    """Pixels as the image processor gives them (B x 3 x H x W), for a whole batch at once: the images have the right
    size already, and one by one the image processor would take longer than the training step.
    """
    pixels_BCHW = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean_CHW, std_CHW = torch.tensor([image_processor.image_mean, image_processor.image_std])[:, :, None, None].unbind()
    return (pixels_BCHW - mean_CHW) / std_CHW
