"""What only a GPU can show, beside memory and speed: one function for each question. On a CPU they run too, at toy
size: then they show that they work, and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from PIL import Image
from rich.console import Console
from shapes import with_ordinary_heads
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from qmixlora.backbone.levers import enable_checkpointing
from qmixlora.backbone.levers.streaming import Copies
from qmixlora.data import load_split
from qmixlora.demo.backbone import make_config, processor_of
from qmixlora.device import default_device
from qmixlora.errors import UserError
from qmixlora.files import write_json
from qmixlora.loss import supervised_loss
from qmixlora.memory import Plan, plan_with_advice
from qmixlora.memory.planner import WORKSPACES
from qmixlora.mixlora import is_adapter_parameter
from qmixlora.recipe import Recipe, edited, validate
from qmixlora.session import open_session
from qmixlora.training import train_within_memory

WORDS = ("user", "assistant", "system", ":", "what", "is", "it", "?", "red", "green", "blue", "a", "square")
TURNS = 20  # steps of streamed layers under either delay
CYCLES = 20_000_000  # of the card's clock that a stream is held up: about ten milliseconds


def quantisers(toy: bool) -> dict[str, Any]:
    """Whether bitsandbytes' CUDA quantiser gives the bytes of its CPU one, which `merge` may use."""
    size, results = 256 if toy else 4096, {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.randn(size, size, dtype=dtype) * 0.02
        (here, here_state), (there, there_state) = (
            quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
            for device in (torch.device("cpu"), default_device())
        )
        results[str(dtype).removeprefix("torch.")] = {
            "weights": weight.numel(),
            "bytes_that_differ": int((here.flatten() != there.cpu().flatten()).sum()),
            "scales_that_differ": int((here_state.absmax != there_state.absmax.cpu()).sum()),
            "mean_scale_difference": float((here_state.offset - there_state.offset.cpu()).abs()),
        }
    return results


def context(toy: bool) -> dict[str, Any]:
    """Bytes of a CUDA process beside its allocator, after a matrix product, an NF4 layer and its gradient."""
    if not torch.cuda.is_available():
        return {"context": None}
    free_before, total = torch.cuda.mem_get_info()
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (x @ x.T).sum().backward()
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(4096, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    layer(x).square().mean().backward()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {"total": total, "free_before": free_before, "context": total - free - reserved, "reserved": reserved}


def levers(toy: bool) -> dict[str, Any]:
    """Loss and gradients of a step with each lever against those without; streamed layers with either stream slowed."""
    with _data_and_model(toy) as recipe:
        plain = _step(recipe)
        kinds = {
            "again": [],  # what the card itself does not repeat
            "no checkpointing": ["train.checkpointing.enabled=false"],
            "offloaded activations": ["train.checkpointing.offload=true"],
            "offloaded embeddings": ["model.offload_embeddings=true"],
            "streamed": [f"model.stream_layers={_layers(toy)}"],
            "chunks": ["train.loss_chunk=2"],
        }
        results = {name: _difference(plain, _step(edited(recipe, edits))) for name, edits in kinds.items()}
        streamed = edited(recipe, kinds["streamed"])
        for name, delayed in (("copies", _slow_copies), ("computing", nullcontext)):
            with delayed():
                # of one session: what a step leaves in the buffers is what the next one begins with
                steps = _steps(streamed, 2 if toy else TURNS, computing_is_slow=name == "computing")
                turns = [_difference(plain, step) for step in steps]
            results[f"streamed, slow {name}"] = max(turns, key=lambda turn: turn["gradients"])
        for precision in ("int8", "nf4"):
            results[f"{precision} head"] = _difference(
                plain, _step(edited(recipe, [f"model.quantize_lm_head={precision}"]))
            )
    return results


def ladder(toy: bool) -> dict[str, Any]:
    """A run on a card that is too small, in training and while loading: what was changed, and what was left behind."""
    if not torch.cuda.is_available() and not toy:
        return {"skipped": "no GPU"}
    with _data_and_model(toy, repeated=4 if toy else 100) as recipe:
        recipe = edited(recipe, ["train.micro_batch_size=8", "train.gradient_accumulation=1", "train.max_steps=3"])
        planned = [str(saving.edit) for saving in plan_with_advice(recipe).savings]
        results: dict[str, Any] = {"planned": planned}
        for where in ("training", "loading"):
            output = str(Path(recipe.train.output).parent / where)
            with _held_to(recipe, where):
                results[where] = _run(edited(recipe, [f"train.output={output}"]))
    return results


def _run(recipe: Recipe) -> dict[str, Any]:
    told = io.StringIO()
    try:
        train_within_memory(recipe, console=Console(file=told, width=200))
        ended = "finished"
    except UserError as error:
        ended = str(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log = Path(recipe.train.output) / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "ended": ended,
        "changed": [record["changed"] for record in records if "changed" in record],
        "left": torch.cuda.memory_allocated() if torch.cuda.is_available() else None,
        "told": told.getvalue()[-2000:],
    }


def limit_of(plan: Plan, where: str) -> int:
    """Bytes for the allocator that do for loading, and for training but for half of a step's own; or, where loading is
    to fail, nine tenths of the weights.
    """
    parts = plan.parts
    if where == "loading":
        return int(0.9 * (parts.nf4_weights + parts.kept_out_weights))
    return plan.tensors + parts.gaps + WORKSPACES - (parts.activations_saved + parts.transients) // 2


@contextlib.contextmanager
def _held_to(recipe: Recipe, where: str) -> Iterator[None]:
    """Hold torch's allocator to less than a part of the run takes."""
    if not torch.cuda.is_available():
        yield
        return
    limit = limit_of(plan_with_advice(recipe).plan, where)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def _data_and_model(toy: bool, repeated: int = 1) -> Iterator[Recipe]:
    """A recipe for a random LLaVA and pictures of one colour, in a folder of its own. Answers are so many times as long
    as a few words.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = processor_of(WORDS)
        torch.manual_seed(0)
        config = make_config(processor.tokenizer, layers=_layers(toy), width=128 if toy else 2048)
        with_ordinary_heads(config.text_config)
        LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        rows = []
        for index in range(32):
            Image.new("RGB", (32, 32), (index * 7, 0, 255 - index * 7)).save(folder / f"{index}.png")
            question = {"from": "human", "value": "<image>\nwhat is it ?"}
            words = WORDS[8 : 9 + index % 4] * repeated
            answer = {"from": "gpt", "value": " ".join(words)}
            rows.append({"image": f"{index}.png", "task": f"t{index % 2}", "conversations": [question, answer]})
        write_json(folder / "data.json", rows)
        yield validate(
            {
                "model": {"id": str(folder / "model"), "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
                "adapter": {"dropout": 0.0},
                "data": {"train": str(folder / "data.json"), "max_length": 1024},
                "train": {"output": str(folder / "run"), "optimizer": "adamw_8bit", "log_every": 1, "save_every": None},
            },
            "benchmarks/on_gpu.py",
        )


def _layers(toy: bool) -> int:
    return 4 if toy else 12


def _step(recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch after another one, of an adapter whose factors all have a gradient."""
    return next(_steps(recipe, 1))


def _steps(
    recipe: Recipe, count: int, *, computing_is_slow: bool = False
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The same micro-batch again and again, each time after another one."""
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, ["t0", "t1"])
    enable_checkpointing(session.backbone, session.anatomy, recipe.train.checkpointing)
    model = session.model.train()
    for name, parameter in sorted(model.named_parameters()):
        if "mixlora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.02)
    for path in session.anatomy.layers if computing_is_slow and torch.cuda.is_available() else ():
        session.backbone.get_submodule(path).register_forward_hook(_sleeps)
    center = {name: buffer.clone() for name, buffer in model.named_buffers() if is_adapter_parameter(name)}
    for _ in range(count):
        for start in (0, 8):
            for name, buffer in center.items():  # running means move with every batch
                model.get_buffer(name).copy_(buffer)
            model.zero_grad()
            inputs = session.on_device(session.collator([rows[index] for index in range(start, start + 8)]))
            loss = supervised_loss(model, inputs, chunk=recipe.train.loss_chunk)
            loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        yield loss.detach().cpu(), gradients


def _sleeps(*_: Any) -> None:
    """A layer's computing is late, so that a copy that does not wait overwrites what is still read."""
    torch.cuda._sleep(CYCLES)


def _difference(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
    """How far two steps are apart: the loss, and the worst tensor's gradient by its norm."""
    (loss, gradients), (other_loss, others) = one, other
    apart = [float((g - others[name]).norm() / g.norm().clamp_min(1e-12)) for name, g in gradients.items()]
    same = gradients.keys() == others.keys() and all(torch.equal(g, others[name]) for name, g in gradients.items())
    return {"loss": float((loss - other_loss).abs() / loss), "gradients": max(apart), "to_the_bit": same}


@contextlib.contextmanager
def _slow_copies() -> Iterator[None]:
    """Streamed bytes arrive late: the copying stream sleeps before every copy."""
    start = Copies.start

    def late(copies: Copies, buffer: Tensor, host: list[Tensor], key: int) -> None:
        if copies.stream is not None:
            with torch.cuda.stream(copies.stream):
                torch.cuda._sleep(CYCLES)
        start(copies, buffer, host, key)

    Copies.start = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Copies.start = start  # type: ignore[method-assign]
