"""Rivals of the mixture, each with what a run shares: data, steps, batch, and the instance's own condition.

What `prepare` takes is the fresh Trainer of a mixture. What pays becomes a config value; what does not stays here.

Shapes: B batch, S sequence, N instances, M = layers x N, D width of the condition, E factors in a pool, R active
factors, K = E / R experts.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import experiments
import torch
from experiments import ADAPTER
from peft import ArrowConfig, LoraConfig
from peft.utils.other import ModulesToSaveWrapper
from prepared import Row, tasks_of, with_answers_of
from progress import Phase, Steps
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_sequence

from qmixlora.backbone.full_precision import train_in_fp32
from qmixlora.mixlora import MixLoraConfig, MixLoraLayer, selection
from qmixlora.mixlora import batch as tuner_module
from qmixlora.mixlora.inputs import image_token_ids
from qmixlora.mixlora.routing import Routing
from qmixlora.mixlora.running_means import Center
from qmixlora.mixlora.selection import mean_over
from qmixlora.recipe import edited
from qmixlora.session import TunedSession
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

ARROW = "arrow_router"  # PEFT's name for it
SMALLER = 4  # the batch of one task's LoRA is this much smaller, and its steps as many more


class _OneAManyB(MixLoraConfig):
    pairs_by_index = False  # mixing matrices are R x E


def shared_a(trainer: Any) -> None:
    """One A, many B (HydraLoRA, arXiv 2404.19245; routed on the task, AsymLoRA): K experts of rank R share the R
    vectors a, and each has R vectors b. An instance's update is their sum, weighted by the softmax of K scores.

    Expects `pairing: tied`, which has one router.
    """
    config = _config(trainer)
    config.__class__ = _OneAManyB
    experts = config.num_factors // config.r
    for layer in _layers(trainer):
        for pool, kept in ((layer.mixlora_A, config.r), (layer.mixlora_route_A, experts)):
            pool[ADAPTER] = nn.Parameter(pool[ADAPTER].detach()[:kept].clone())

    def select(config: MixLoraConfig, logits_MK: Tensor, *unused: Tensor | None) -> Tensor:
        gate_MK = logits_MK.softmax(dim=-1)
        mix_MRKR = torch.einsum("mk,ij->mikj", gate_MK, torch.eye(config.r, device=gate_MK.device))
        return mix_MRKR.flatten(2)  # M x R x E: factor j of expert k stands at k R + j

    tuner_module.select = select


def always_on(count: int) -> Callable[[Any], None]:
    """The first `count` factors work for every instance with weight 1, beside R routed ones of the others (as the
    shared experts of DeepSeekMoE, arXiv 2401.06066; MoCLE's universal expert, arXiv 2312.12379, weighs what its router
    leaves). Expects `pairing: tied`.
    """

    def prepare(trainer: Any) -> None:
        config = _config(trainer)
        routed = replace(config, num_factors=config.num_factors - count)
        for layer in _layers(trainer):
            route_ED = layer.mixlora_route_A[ADAPTER].detach()
            layer.mixlora_route_A[ADAPTER] = nn.Parameter(route_ED[count:].clone())

        def select(config: MixLoraConfig, logits_ME: Tensor, *none: None) -> Tensor:
            mix_MEF = selection.select(routed, logits_ME)
            gate_ME = mix_MEF.diagonal(dim1=1, dim2=2)
            return torch.diag_embed(torch.cat([gate_ME.new_ones(len(gate_ME), count), gate_ME], dim=1))

        tuner_module.select = select

    return prepare


def contextual(share: float, below: Literal["embedding", "uniform"]) -> Callable[[Any], None]:
    """Layers above the first `share` of the blocks are routed on states: the instruction's mean behind those blocks,
    which have seen the image. Those below are routed on embeddings, or `uniform`: all their factors work alike, with
    the weight of a chosen one.

    Each token's state is layer-normalised before the mean: that of a sequence's first is tens to hundreds of times as
    large as others (an attention sink), and stands in the first question of a conversation alone.

    Without activation checkpointing. Expects `route_on: embedding`.
    """

    def prepare(trainer: Any) -> None:
        tuner, config = trainer.model.base_model, _config(trainer)
        blocks = _blocks(trainer)
        names = list(blocks)[: max(1, round(share * len(blocks)))]
        lower = [layer for name in names for layer in blocks[name]]
        select_ahead, context = tuner.select_ahead, tuner.mixlora_routing
        width = trainer.model.get_input_embeddings().embedding_dim
        tuner.mixlora_center["states"] = Center(width, device=trainer.model.device)

        def select_uniformly(name: str) -> None:
            cache, instances = context.current.cache, len(context.current.cache.conditions[name])
            even_EE = torch.eye(config.num_factors, device=trainer.model.device)
            for layer in lower:
                cache.selected[layer, name] = even_EE.expand(instances, -1, -1)

        def select_again(module: nn.Module, args: Any, output: Any) -> None:
            routing = context.current
            if routing.carried is not None and routing.segments is None:
                return  # decoding: the gates are those of the prefill
            state_BSD = output[0] if isinstance(output, tuple) else output
            mean_ND = routing.mean_input(layer_norm(state_BSD.float(), state_BSD.shape[-1:]), "instruction")
            routing.cache.conditions[ADAPTER] = tuner.mixlora_center["states"](mean_ND, routing)
            select_ahead(ADAPTER)  # of those below, which have run, it changes nothing

        if below == "uniform":
            for layer in lower:
                layer.mixlora_route_A[ADAPTER].requires_grad_(False)
            tuner.select_ahead = select_uniformly
        trainer.model.base_model.model.get_submodule(names[-1]).register_forward_hook(select_again)

    return prepare


def question_read_ahead(blocks: int, sample: int = 512) -> Callable[[Any], None]:
    """Route on the question alone, as the first few frozen blocks read it, without the image and without an adapter:
    the mean of its tokens' layer-normalised states, whitened by those of a sample of the training questions (directions
    that vary less than a tenth of the widest one are not blown up), at the scale of the conditions that it replaces.

    Expects `route_on: embedding`.
    """

    def prepare(trainer: Any) -> None:
        model = trainer.model.base_model.model
        lower = [layer for layers in list(_blocks(trainer).values())[:blocks] for layer in layers]
        decoder = model.get_decoder()

        def read(questions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            """The mean state of every question behind the blocks, and in the embedding (N x D each)."""
            ids_NS = pad_sequence(list(questions), batch_first=True)
            mask_NS = pad_sequence([torch.ones_like(ids_S) for ids_S in questions], batch_first=True)
            with _first_blocks(decoder, blocks, lower), torch.no_grad():
                embedding_NSD = model.get_input_embeddings()(ids_NS)
                state_NSD = decoder(inputs_embeds=embedding_NSD, attention_mask=mask_NS, use_cache=False)[0].float()
            state_NSD = layer_norm(state_NSD, state_NSD.shape[-1:])
            return mean_over(state_NSD, mask_NS.bool()), mean_over(embedding_NSD.float(), mask_NS.bool())

        rows = trainer.train_dataset
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:sample].tolist()
        images = torch.tensor(image_token_ids(model.config))
        questions = [question for index in drawn for question in _questions(rows[index], images)]
        read_in_parts = [read(questions[start : start + 64]) for start in range(0, len(questions), 64)]
        states_ND, embeddings_ND = (torch.cat(parts) for parts in zip(*read_in_parts, strict=True))
        mean_1D = states_ND.mean(dim=0, keepdim=True)
        _, size_D, axes_DD = torch.linalg.svd(states_ND - mean_1D, full_matrices=False)
        white_DD = axes_DD.T / (size_D + 0.1 * size_D[0]) @ axes_DD
        before_ND = layer_norm(embeddings_ND, embeddings_ND.shape[-1:])
        before = (before_ND - before_ND.mean(dim=0)).norm(dim=1).mean()
        white_DD *= before / ((states_ND - mean_1D) @ white_DD).norm(dim=1).mean()

        def condition(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
            states_ND, _ = read(experiments.instructions(routing, inputs["input_ids"]))
            return (states_ND - mean_1D) @ white_DD

        experiments.replace_condition(trainer, lambda original: condition)

    return prepare


@contextmanager
def _first_blocks(decoder: Any, count: int, adapted: Sequence[MixLoraLayer]) -> Iterator[None]:
    """The decoder's first blocks alone in this block, without its last norm and without what adapts them."""
    whole, norm = decoder.config.num_hidden_layers, decoder.norm
    decoder.config.num_hidden_layers, decoder.norm = count, nn.Identity()
    for layer in adapted:
        layer._disable_adapters = True
    try:
        yield
    finally:
        decoder.config.num_hidden_layers, decoder.norm = whole, norm
        for layer in adapted:
            layer._disable_adapters = False


def _questions(row: Row, image_ids_X: Tensor) -> list[Tensor]:
    """The text tokens of every question of a prepared row."""
    ids_S = row["input_ids"]
    text_S = row["routing_mask"] & ~torch.isin(ids_S, image_ids_X)
    segments_S = row.get("segments", torch.zeros_like(ids_S))
    return [ids_S[text_S & (segments_S == number)] for number in segments_S.unique().tolist() if number >= 0]


def train_by_task(session: TunedSession, rows: Sequence[Row], folder: Path, phase: Phase) -> float:
    """Train a LoRA for each task, under its name, on its own answers: on as many samples as its share of the run has,
    `SMALLER` of them at a time, so that it has enough steps to come from nothing. Returns the mean loss.
    """
    model, tasks, train = session.model, tasks_of(rows), session.recipe.train
    own_config = model.peft_config[ADAPTER]
    batch = max(1, train.micro_batch_size * train.gradient_accumulation // SMALLER)
    total = (train.max_steps or len(tasks)) * SMALLER
    phase.total = total
    losses = []
    for index, task in enumerate(tasks):
        first, end = (number * total // len(tasks) for number in (index, index + 1))
        model.add_adapter(task, copy.deepcopy(own_config))
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                train_in_fp32(module.modules_to_save[task])
        model.set_adapter(task)
        steps = (f"train.max_steps={max(1, end - first)}", "train.warmup_ratio=0")
        batches = (f"train.micro_batch_size={batch}", "train.gradient_accumulation=1")
        recipe = edited(session.recipe, [*steps, *batches])
        trainer = make_trainer(
            replace(session, recipe=recipe),
            with_answers_of(rows, task),
            None,
            folder / str(index),
            ProgressDisplay(Console(quiet=True)),
        )
        trainer.add_callback(Steps(phase, before=first))
        losses.append(trainer.train().training_loss)
    model.delete_adapter(ADAPTER)
    return statistics.fmean(losses)


def arrow(session: TunedSession, tasks: Sequence[str]) -> None:
    """Join LoRAs of tasks by Arrow (arXiv 2405.11157), PEFT's routing of tokens without training: each token goes to
    the three LoRAs whose update answers most to its state.

    `peft.create_arrow_model` would put the router on all layers of these names, the vision tower's among them.
    """
    config = session.model.peft_config[tasks[0]]
    of_arrow = ArrowConfig(rng_seed=0)
    of_arrow.task_adapter_names = list(tasks)
    router = LoraConfig(arrow_config=of_arrow, r=config.r, target_modules=config.target_modules)
    session.model.add_adapter(ARROW, router)
    session.model.set_adapter(ARROW)


def _config(trainer: Any) -> MixLoraConfig:
    config: MixLoraConfig = trainer.model.peft_config[ADAPTER]
    return config


def _layers(trainer: Any) -> list[MixLoraLayer]:
    return [module for module in trainer.model.modules() if isinstance(module, MixLoraLayer)]


def _blocks(trainer: Any) -> dict[str, list[MixLoraLayer]]:
    """The adapted layers by the path of their decoder block, in the order of the model."""
    blocks: dict[str, list[MixLoraLayer]] = {}
    for name, module in trainer.model.base_model.model.named_modules():
        if isinstance(module, MixLoraLayer) and (match := re.match(r"(.*?\.\d+)\.", name)):
            blocks.setdefault(match[1], []).append(module)
    return blocks
