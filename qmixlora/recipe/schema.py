"""The sections of a recipe, typed and strict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, ConfigDict, Field

from . import template
from .section import Section
from .strict_yaml import dump_yaml

EMBEDDED, REAL = "embedded", "real"  # values of model.id and data.train for the demo's own backbones and data
MADE_HERE = (EMBEDDED, REAL)
METRICS = ("exact", "vqa", "anls", "relaxed", "choice", "number", "contains", "f1", "rouge_l", "cider")
OWN_INPUT = ("all", "instruction")  # values of adapter.route_on: the condition is a layer's own input
MAX_PIXELS = 2**30 // 4 // 3  # a quarter GiB of RGB, where Pillow itself begins to warn; cameras stay below it


class Model(Section):
    """The frozen backbone."""

    PATHS: ClassVar = ("id",)
    id: str = Field(description="hub id, local folder, or 'embedded' or 'real' for the demo's own backbones")
    revision: str | None = Field(default=None, description="hub revision: a branch, tag or commit")
    quantization: Literal["nf4", "none"] = Field(default="nf4", description="nf4: 4-bit NF4 with double quantisation")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="compute dtype, and the dtype of everything that is not quantised"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    keep: list[str] = Field(
        default=[], description="decoder layers that stay in 16 bits under nf4, such as [down_proj, layers.0.*]"
    )
    quantize_lm_head: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="hold lm_head in 8 or 4 bits; where it is tied to the embeddings, one table for both",
    )
    quantize_embeddings: Literal["none", "int8", "nf4"] = Field(
        default="none", description="hold the input embeddings in 8 or 4 bits"
    )
    quantize_vision: Literal["none", "int8", "nf4"] = Field(
        default="none", description="hold the linear layers of the vision tower in 8 or 4 bits"
    )
    offload_embeddings: bool = Field(
        default=False,
        description="keep the input embeddings (where lm_head is tied to them, those of layers alone) in host memory; "
        "the rows of a batch are copied over",
    )
    stream_layers: int = Field(
        default=0, ge=0, description="decoder layers whose 4-bit weights stay in host memory and are copied in for use"
    )
    template_arguments: dict[str, Any] = Field(
        default={}, description="arguments of the model's chat template, such as {enable_thinking: false}"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    learned_on: dict[str, str] = Field(default={}, description="what tells a run's base from another; it writes it")


class Adapter(Section):
    """The trainable part."""

    method: Literal["mixlora", "lora"] = Field(default="mixlora", description="lora: plain PEFT LoRA, the baseline")
    num_factors: int = Field(default=16, ge=1, description="E, factors in each pool (mixlora)")
    r: int = Field(default=16, ge=1, description="R, factors active for an instance; the rank (lora)")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(default=0.05, ge=0, lt=1)
    pairing: Literal["conditional", "released", "tied"] = "tied"
    gate: Literal["hard", "straight_through", "weighted", "dense"] = "weighted"
    route_on: Literal["all", "instruction", "embedding", "task"] = "embedding"
    condition_norm: Literal["none", "center"] = Field(
        default="center", description="center: routed on without what all inputs share (their running mean)"
    )
    router: Literal["layer", "block", "model"] = Field(
        default="layer", description="the layers that share a router: none, those of a decoder block, or all"
    )
    task_mix: float = Field(default=0.0, ge=0, le=1, description="share of samples gated by their task's mean")
    target_modules: Literal["language"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="language", description="'language': every linear layer of the decoder; or suffixes of their names"
    )
    projector: Literal["full", "lora", "frozen"] = Field(
        default="full",
        description="full: trained whole, in fp32; lora: factors of rank r on each of its linear layers; frozen",
    )


class Columns(Section):
    """The columns of a table of questions and answers, by what they hold.

    Any further key is a text of its own (`hint: lecture`), which `data.template` puts into the question.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, str]

    question: str = Field(description="column with the question")
    answer: str = Field(description="column with the answer, or with a list of answers that are all right")
    image: str | list[str] | None = Field(default=None, description="column with the picture (or pictures), or several")
    options: str | list[str] | None = Field(
        default=None, description="column with the list of options, or one column for each option"
    )
    task: str | None = Field(default=None, description="column with the task's name")

    def texts(self) -> dict[str, str]:
        """The columns of single texts that a template may use, by their keys there."""
        return {"question": self.question, **(self.__pydantic_extra__ or {})}


class Part(Section):
    """One source of a mixture; what it leaves out is as in `data`."""

    PATHS: ClassVar = ("path", "image_root")
    path: str = Field(description="as data.train")
    split: str = Field(default="train", description="of a data set that has several")
    weight: float | None = Field(
        default=None, gt=0, description="how often its rows come: 0.5 half of them once, 2 all of them twice"
    )
    samples: int | None = Field(default=None, ge=1, description="in place of weight: so many rows, drawn by split_seed")
    task: str | None = Field(default=None, description="the task of all its rows")
    columns: Columns | None = None
    template: str | None = None
    image_root: str | None = None
    task_field: str | None = None
    subset: str | None = Field(default=None, validation_alias=AliasChoices("subset", "name"))


Amount = Annotated[float, Field(gt=0, strict=True)]  # below 1 a share, else so many


class Data(Section):
    """Conversations with images, or a table of questions and answers (docs/data.md)."""

    PATHS: ClassVar = ("train", "validation", "test", "image_root")
    train: str | list[Part] = Field(
        description="file (json, jsonl, csv, tsv, parquet), folder, data set on the hub, 'embedded', 'real'; or several"
    )
    validation: str | Amount | None = Field(
        default=None, description="as train; or a share of it (0.1), or so many of its rows, cut from it"
    )
    test: str | Amount | None = Field(default=None, description="as validation")
    columns: Columns | None = Field(default=None, description="columns of a table of questions and answers")
    template: str | None = Field(
        default=None, description="the question, with keys of data.columns in braces: '{question}\\n{options}'"
    )
    on_bad_sample: Literal["stop", "skip"] = Field(
        default="stop", description="samples that cannot be read: stop and list them, or leave them out and say so"
    )
    image_root: str | None = Field(default=None, description="folder that image paths start from (default: the file's)")
    allow_outside: bool = Field(
        default=False, description="let the data name images outside of that folder, anywhere on this machine"
    )
    task_field: str | None = Field(default=None, description="field with the task's name (default: task or task_name)")
    subset: str | None = Field(
        default=None, description="configuration of a data set that has several (`name` in datasets.load_dataset)"
    )
    max_length: int = Field(default=2048, ge=8, description="longest sample in tokens, images included; never cut")
    max_image_tokens: int | None = Field(
        default=None, ge=1, description="scale images down (or take fewer tiles), so that none takes more tokens"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="width x height of the largest image that is decoded; larger are refused"
    )
    check_images: Literal["header", "full"] = Field(
        default="header", description="before the first step: read every image's header, or decode every image"
    )
    special_tokens: list[str] = Field(
        default=[], description="the model's own, such as <|box_start|>, that texts hold as tokens (else: as letters)"
    )
    split_seed: int = Field(default=0, description="of rows that are cut from the training data")
    held_out: dict[str, str] | None = Field(default={}, description="digests of what a run has cut; it writes them")
    learned: str | None = Field(default=None, description="a digest of the rows that a run learned; it writes it")
    group_by_length: bool | Literal["step"] = Field(
        default=False,
        description="make batches of samples of about one length: less padding; an epoch holds the same. `step`: only"
        " the micro-batches of each optimiser step, which learns the same",
    )
    num_workers: int | None = Field(
        default=None, ge=0, description="processes that make batches (null: by the machine's cores and the data's size)"
    )
    metrics: dict[str, str] = Field(
        default={}, description=f"by task, or '*' for all others: {', '.join(METRICS)}; MODULE:FUNCTION with allow_code"
    )
    tolerance: float = Field(default=0.0, ge=0, lt=1, description="of metric number: the share it may be off")
    allow_code: bool = Field(default=False, description="run the Python functions that data.metrics names")

    @property
    def sources(self) -> list[str]:
        """The paths or names of the training data."""
        return [self.train] if isinstance(self.train, str) else [part.path for part in self.train]

    def metric_of(self, task: str) -> str | None:
        """The metric of a task; None where evaluation chooses it."""
        return self.metrics.get(task, self.metrics.get("*"))

    def question_template(self) -> str:
        """The template of questions in columns: the recipe's own, or the question with its options below."""
        has_options = self.columns is not None and self.columns.options is not None
        return self.template if self.template is not None else template.NAMED if has_options else template.OPEN


class Checkpointing(Section):
    """Activation checkpointing (always non-reentrant)."""

    enabled: bool = True
    every_n_layers: int = Field(default=1, ge=1)
    offload: bool = Field(default=False, description="keep what is saved in host memory")


class Train(Section):
    """The run."""

    PATHS: ClassVar = ("output",)
    output: str = Field(default="runs/latest", description="the run's folder")
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; overrules epochs")
    micro_batch_size: int = Field(default=1, ge=1, description="samples at a time on the device of each process")
    batch_tokens: int | None = Field(
        default=None, ge=8, description="fill micro-batches by tokens, padding included, in place of micro_batch_size"
    )
    gradient_accumulation: int = Field(default=16, ge=1, description="micro-batches of each process per optimiser step")
    eval_batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw", description="8bit: its states in 8 bits; paged: in memory that moves to the host when short"
    )
    loss_chunk: int | None = Field(
        default=128, ge=1, description="supervised tokens whose logits exist at a time (null: all at once)"
    )
    mlp_chunk: int | None = Field(
        default=None, ge=1, description="tokens whose inside of an MLP exists at a time (null: all at once)"
    )
    cache_features: bool = Field(
        default=False, description="keep every image's features on the disk and the vision tower off the card"
    )
    checkpointing: Checkpointing = Checkpointing()
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything that is drawn, in the range of NumPy's")
    log_every: int = Field(default=10, ge=1, description="optimiser steps")
    eval_every: int | None = Field(default=None, ge=1, description="optimiser steps (default: each epoch)")
    eval_generate: int | None = Field(
        default=None,
        ge=1,
        description="validation samples answered by generation at every evaluation; the best is kept",
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better score (or validation loss)"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=[], description="experiment trackers (extra `trackers`); tensorboard's files lie in the run's folder"
    )
    save_every: int | None = Field(default=500, ge=1, description="optimiser steps (null: no checkpoints)")
    keep_checkpoints: int = Field(default=2, ge=1)
    max_new_tokens: int = Field(default=32, ge=1, description="longest answer when evaluating by generation")
    on_oom: Literal["adapt", "stop"] = Field(
        default="adapt", description="out of memory: pull memory levers and go on from the last step, or stop"
    )
    on_nan: Literal["stop", "skip"] = Field(
        default="stop", description="loss or gradient not finite: stop, or skip the step (three in a row stop)"
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="stop after the step in which this time is over, with a checkpoint"
    )


class Export(Section):
    """The exports of the run."""

    polish: int = Field(
        default=200, ge=0, description="further steps for a task whose static adapter is worse than the live mixture"
    )
    samples: int = Field(default=256, ge=1, description="held-out samples per task that an export is measured on")


class Recipe(Section):
    """One run of qmixlora."""

    model: Model
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    export: Export = Export()

    def with_absolute_paths(self) -> Recipe:
        """The same with local files named from the root, so that the run can be used from any folder."""
        paths = {name: _absolute(getattr(self.data, name)) for name in Data.PATHS}
        model = self.model.model_copy(update={"id": _absolute(self.model.id)})
        return self.model_copy(update={"model": model, "data": self.data.model_copy(update=paths)})

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out."""
        return dump_yaml(self.model_dump())


def _absolute(name: Any) -> Any:
    if isinstance(name, list):
        return [part.model_copy(update={key: _absolute(getattr(part, key)) for key in Part.PATHS}) for part in name]
    return str(Path(name).resolve()) if isinstance(name, str) and name and Path(name).exists() else name
