"""What the mixture costs: a layer and a whole training step against PEFT LoRA, in one process, as ratios.

    python benchmarks/speed.py [--size tiny|small|7b] [--rounds 30] [--compile]

NF4, forward + backward + optimiser step. All variants take turns, round after round; what is printed is the median over
rounds of a variant's time divided by that of LoRA r=R in the same round, so that a machine that speeds up or slows down
does not matter. `dense released layer` builds `A B` (I x O) for every instance, as the authors' code does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from shapes import SIZES, Size, backbone_folder, batch_of
from torch import Tensor, nn

from qmixlora.backbone import keep_cpu_weights_unpacked, load_backbone
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig
from qmixlora.mixlora.layer import Linear
from qmixlora.recipe import Model

RESULTS = Path(__file__).parent / "results" / "speed"
E, R = 16, 4


def released_update(self: Linear, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
    """`result + x (A B)` with an I x O matrix per instance."""
    config = self.mixlora_config[adapter_name]
    mix_BEF = (config.scaling * self.mixing(x, adapter_name)).to(x.dtype)
    A_EI, B_EO = self.mixlora_A[adapter_name].to(x.dtype), self.mixlora_B[adapter_name].to(x.dtype)
    return result + x @ torch.einsum("ei,bef,fo->bio", A_EI, mix_BEF, B_EO)


def of_batch(batch: int, *, toy: bool, compiled: bool, rounds: int = 10) -> dict[str, Any]:
    """Layer and step of our default against LoRA, at a micro-batch: by the clock, and by the GPU's own time."""
    size = replace(SIZES["tiny" if toy else "7b"], batch=batch)
    names = ("no adapter", f"LoRA r={R}", f"LoRA r={E}", "our default", "conditional, straight_through")
    rounds = 2 if toy else rounds
    layer, step = layer_steps(size, names), whole_steps(size, compiled, names)
    return {
        "layer": ratios(layer, rounds),
        "step": ratios(step, rounds),
        "gpu_milliseconds": {name: gpu_milliseconds(work) for name, work in step.items()},
    }


def gpu_milliseconds(work: Callable[[], None]) -> float | None:
    """The time that kernels of one step take on the card, without what lies between them; None without a card."""
    if not torch.cuda.is_available():
        work()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
        work()
        synchronize()
    return sum(event.self_device_time_total for event in watched.key_averages()) / 1000


def variants(names: Collection[str] | None = None) -> dict[str, Any]:
    """Configurations by name; all, or some."""
    lora = {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=2 * r, target_modules=[]) for r in (R, E)}
    axes = [
        ("tied", "weighted"), ("tied", "dense"), ("tied", "straight_through"), ("tied", "hard"),
        ("conditional", "weighted"), ("conditional", "dense"), ("conditional", "straight_through"),
        ("conditional", "hard"),
    ]  # fmt: skip
    ours = {
        f"{pairing}, {gate}": MixLoraConfig(num_factors=E, r=R, dropout=0.0, pairing=pairing, gate=gate)
        for pairing, gate in axes
    }
    default = MixLoraConfig(dropout=0.0)
    known = {
        "no adapter": None,
        **lora,
        "our default": default,
        **ours,
        "dense released layer": MixLoraConfig.released(E, R),
    }
    return known if names is None else {name: known[name] for name in names}


def prepare(name: str, config: Any, model: nn.Module, targets: list[str]) -> nn.Module:
    if config is None:
        return model.requires_grad_(False)
    config.target_modules = targets
    model = get_peft_model(model, config)
    if name == "dense released layer":
        for module in model.modules():
            if isinstance(module, Linear):
                module.add_update = released_update.__get__(module)
    return model


def step_of(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """One training step; without an adapter, the gradient goes to the embeddings' output alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    if optimizer is None:
        model.enable_input_require_grads()

    def step() -> None:
        supervised_loss(model, inputs).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    input_ids = torch.randint(100, x.shape[:2], device=x.device)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        layer(x, input_ids=input_ids).square().mean().backward()
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def ratios(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    reference = seconds[f"LoRA r={R}"]
    return {
        name: {
            "ratio": statistics.median(own / other for own, other in zip(times, reference, strict=True)),
            "milliseconds": 1000 * statistics.median(times),
        }
        for name, times in seconds.items()
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def whole_steps(size: Size, compiled: bool, names: Collection[str] | None = None) -> dict[str, Callable[[], None]]:
    folder = backbone_folder(size)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    steps = {}
    # layers differ in what has been mixed before them, and variants share code: one graph for each, or an error
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for name, config in variants(names).items():
        backbone, _, anatomy = load_backbone(Model(id=str(folder), dtype=dtype))
        inputs = batch_of(size, backbone)
        model = prepare(name, config, backbone, list(anatomy.targets))
        model.train()
        for path in anatomy.layers if compiled else ():  # layer by layer: they are alike, so that one graph serves all
            backbone.get_submodule(path).compile()
        steps[name] = step_of(model, inputs)
    return steps


class OneLayer(nn.Module):
    """A layer with the embeddings that it may be routed on."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.linear = layer
        self.embedding = nn.Embedding(100, x.shape[2], device=x.device).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return self.linear(x)


def layer_steps(size: Size, names: Collection[str] | None = None) -> dict[str, Callable[[], None]]:
    import bitsandbytes as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(size.batch, size.tokens, size.width, device=device, dtype=dtype, requires_grad=True)
    steps = {}
    for name, config in variants(names).items():
        linear = bnb.nn.Linear4bit(size.width, size.width, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
        keep_cpu_weights_unpacked(linear)
        model = prepare(name, config, OneLayer(linear, x), ["linear"])
        steps[name] = layer_step(model, x)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder layers")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    size = SIZES[arguments.size]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result: dict[str, Any] = {
        "size": arguments.size,
        "compiled": arguments.compile,
        "hardware": gpu or f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "layer": ratios(layer_steps(size), arguments.rounds),
        "step": ratios(whole_steps(size, arguments.compile), arguments.rounds),
    }
    print(f"{'':32}{'layer':>14}{'whole step':>16}   (time over LoRA r={R}; ms)")
    for name in result["step"]:
        cells = (
            f"{result[part][name]['ratio']:.2f} {result[part][name]['milliseconds']:7.1f}" for part in ("layer", "step")
        )
        print(f"{name:32}" + "  ".join(f"{cell:>14}" for cell in cells))
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{'gpu' if gpu else 'cpu'}-{arguments.size}{'-compiled' if arguments.compile else ''}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
