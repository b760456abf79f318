"""What other tools call the keys of a recipe: transformers' TrainingArguments, PEFT's LoraConfig, LLaMA-Factory,
Axolotl, ms-swift, Unsloth and TRL.
"""

from __future__ import annotations

SYNONYMS = {
    "model.id": ("model_name_or_path", "base_model", "model_name", "model_id", "pretrained_model_name_or_path", "name"),
    "model.quantization": ("load_in_4bit", "quant", "quantization_bit", "quant_bits", "quant_method", "bits"),
    "model.dtype": ("bf16", "fp16", "torch_dtype", "precision"),
    "model.attention": ("attn_implementation", "attn_impl", "flash_attn", "flash_attention"),
    "model.template_arguments": ("chat_template_kwargs", "template_kwargs"),
    "adapter.r": ("rank", "lora_r", "lora_rank"),
    "adapter.num_factors": ("num_experts", "experts", "factors"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.target_modules": ("lora_target_modules", "lora_target", "targets"),
    "adapter.projector": (
        "train_projector",
        "freeze_aligner",
        "freeze_multi_modal_projector",
        "tune_mm_mlp_adapter",
        "modules_to_save",
    ),
    "data.train": ("dataset", "datasets", "data_path", "train_file", "train_dataset"),
    "data.validation": ("val_set_size", "val_dataset", "eval_dataset", "split_dataset_ratio", "val_size", "eval"),
    "data.image_root": ("image_folder", "image_dir", "media_dir", "images"),
    "data.subset": ("config_name", "dataset_config_name"),
    "data.group_by_length": ("train_sampling_strategy", "group_by_modality_length", "length_grouped"),
    "data.max_length": (
        "cutoff_len",
        "sequence_len",
        "max_seq_length",
        "max_seq_len",
        "model_max_length",
        "seq_length",
    ),
    "data.max_pixels": ("image_max_pixels",),
    "data.max_image_tokens": ("max_visual_tokens", "image_max_tokens"),
    "data.num_workers": ("dataloader_num_workers", "preprocessing_num_workers", "workers"),
    "train.output": ("output_dir", "out_dir", "save_dir"),
    "train.epochs": ("num_train_epochs", "num_epochs", "epoch"),
    "train.micro_batch_size": ("batch_size", "per_device_train_batch_size", "train_batch_size", "micro_batch"),
    "train.batch_tokens": ("tokens_per_batch", "max_tokens_per_batch", "max_tokens"),
    "train.gradient_accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "train.eval_batch_size": ("per_device_eval_batch_size",),
    "train.learning_rate": ("lr", "learning_rate_init"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "train.warmup_ratio": ("warmup_steps", "warmup"),
    "train.optimizer": ("optim", "optimiser"),
    "train.max_grad_norm": ("gradient_clipping", "clip_grad_norm", "max_norm"),
    "train.checkpointing": ("gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
    "train.log_every": ("logging_steps",),
    "train.eval_every": ("eval_steps", "evals_per_epoch"),
    "train.report_to": ("logging", "use_wandb", "wandb_project"),
    "train.eval_generate": ("predict_with_generate",),
    "train.early_stopping": ("early_stopping_patience", "patience", "early_stop"),
    "train.save_every": ("save_steps", "saves_per_epoch"),
    "train.keep_checkpoints": ("save_total_limit",),
    "train.max_new_tokens": ("max_generated_tokens", "generation_max_length"),
}
_MEANT = {synonym: key for key, synonyms in SYNONYMS.items() for synonym in synonyms}


def meant_by(word: str) -> str | None:
    """The path of the key that others call so, or that a recipe has in another section; None where it is no synonym."""
    return _MEANT.get(word.lower().replace("-", "_"))
