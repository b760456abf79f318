"""MixLoRA's life as a PEFT method, on a real LLaVA in real NF4."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor

from qmixlora.backbone import load_backbone
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig, routed_as
from qmixlora.mixlora.running_means import Center
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session

from .helpers import bare, layers, logits, randomize_with_centers


def test_a_fresh_adapter_changes_nothing(session: Session, batch: dict[str, Any]) -> None:
    session.model.eval()
    with session.model.disable_adapter():
        before = logits(session.model, batch)
    assert torch.equal(before, logits(session.model, batch))
    randomize_with_centers(session.model)
    assert not torch.allclose(before, logits(session.model, batch))
    with session.model.disable_adapter():
        assert torch.equal(before, logits(session.model, batch))


def test_names_and_shapes_are_those_of_the_design(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    own_input = {"pairing": "conditional", "route_on": "instruction"}
    session = open_session(make_recipe(adapter=own_input), [])
    session.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.0.mlp.down_proj."
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in saved.items() if k.startswith(prefix)}
    assert shapes == {
        "mixlora_A": (4, 192),
        "mixlora_B": (4, 64),
        "mixlora_route_A": (4, 192),
        "mixlora_route_B": (4, 192),
        "mixlora_route_AB": (2, 192, 4),
        "mixlora_center.mean": (1, 192),
        "mixlora_center.count": (1,),
        "mixlora_center.pending": (1, 192),
        "mixlora_center.pending_count": (1,),
    }
    assert {v.dtype for v in saved.values()} == {torch.float32}
    others = {k for k in saved if "mixlora_" not in k}
    assert others and all("multi_modal_projector" in k for k in others)


def test_what_is_routed_on_embeddings_has_their_width_and_one_centre(session: Session, tmp_path: Path) -> None:
    session.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(v.shape) for k, v in saved.items() if k.endswith("mixlora_route_A")} == {(4, 64)}
    assert {k for k in saved if "center" in k} == {
        f"base_model.mixlora_center.{name}" for name in Center(1).state_dict()
    }


def test_a_router_that_layers_share_is_saved_once_and_learns_from_all(
    make_recipe: Callable[..., Recipe], batch: dict[str, Any], tmp_path: Path
) -> None:
    session = open_session(make_recipe(adapter={"router": "model"}), [])
    randomize_with_centers(session.model)
    session.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.model.language_model.layers.0.self_attn.q_proj.mixlora_route_A"
    assert {k for k in saved if "route" in k} == {first}
    last = layers(session.model)[-1]
    supervised_loss(session.model, batch).backward()
    router = session.model.get_parameter(f"{first}.default")
    whole = router.grad.clone()
    router.grad = None
    last.mixlora_B["default"].data.zero_()
    supervised_loss(session.model, batch).backward()
    assert whole.any() and not torch.allclose(router.grad, whole)


def test_the_second_factors_start_at_zero(session: Session) -> None:
    assert not any(layer.mixlora_B["default"].any() for layer in layers(session.model))


@pytest.mark.parametrize("name", ["mixlora_A", "mixlora_route_A"])
def test_factors_and_routers_are_drawn_as_linear_layers_are(session: Session, name: str) -> None:
    """Kaiming uniform with a = sqrt 5 is uniform within 1 / sqrt(I)."""
    layer = layers(session.model)[0]
    width = layer.in_features
    values = getattr(layer, name)["default"]
    assert 0.8 / width**0.5 < values.abs().max() <= 1 / width**0.5


SCRIPT = """
import sys
import torch, qmixlora.mixlora
from peft import PeftModel
from qmixlora.backbone import load_backbone
from qmixlora.recipe import Model

torch.set_num_threads(1)
backbone, *folders = sys.argv[1:]
for folder in folders:
    model, _, _ = load_backbone(Model(id=backbone, dtype="float32"))
    model = PeftModel.from_pretrained(model, folder + "/adapter").eval()
    batch, expected = torch.load(folder + "/expected.pt", weights_only=True)
    del batch["labels"]
    torch.testing.assert_close(model(**batch).logits, expected)
    print("same", folder)
"""


@pytest.mark.long
def test_saved_adapters_give_the_same_logits_in_another_process(
    make_recipe: Callable[..., Recipe], batch: dict[str, Any], tmp_path: Path, backbone: Path
) -> None:
    adapters = [{"route_on": route_on} for route_on in ("instruction", "embedding", "task")]
    adapters += [{"router": router} for router in ("block", "model")]
    folders = [tmp_path / "-".join(adapter.values()) for adapter in adapters]
    for adapter, folder in zip(adapters, folders, strict=True):
        session = open_session(make_recipe(adapter=adapter), sorted(set(batch["tasks"])))
        randomize_with_centers(session.model)
        session.model.eval()
        session.model.save_pretrained(folder / "adapter")
        torch.save((batch, logits(session.model, batch)), folder / "expected.pt")
    command = [sys.executable, "-c", SCRIPT, str(backbone), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [word for folder in folders for word in ("same", str(folder))], done.stderr


OTHER = MixLoraConfig(
    num_factors=3, r=1, pairing="conditional", gate="hard", route_on="instruction", target_modules=["q_proj", "v_proj"]
)


@pytest.fixture
def with_another(session: Session) -> PeftModel:
    """A model with a second adapter, of other factors on fewer layers, with hard gates."""
    randomize_with_centers(session.model)
    session.model.add_adapter("other", OTHER)
    return session.model.eval()


def test_another_adapter_changes_nothing_of_the_first(session: Session, batch: dict[str, Any]) -> None:
    randomize_with_centers(session.model)
    model = session.model.eval()
    first = logits(model, batch)
    model.add_adapter("other", OTHER)
    assert torch.equal(first, logits(model, batch))
    model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(first, logits(model, batch))


def test_the_active_adapter_alone_is_trained_without_its_routers_where_gates_are_hard(with_another: PeftModel) -> None:
    with_another.set_adapter("other")
    trainable = {name for name, parameter in with_another.named_parameters() if parameter.requires_grad}
    assert trainable and all(".other" in name and "route" not in name for name in trainable)


def test_an_adapter_that_is_deleted_leaves_the_others(with_another: PeftModel, batch: dict[str, Any]) -> None:
    first = logits(with_another, batch)
    with_another.set_adapter("other")
    with_another.set_adapter("default")
    with_another.delete_adapter("other")
    assert torch.equal(first, logits(with_another, batch))


def test_the_trainable_set_is_the_adapter_and_the_projector_in_fp32(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(model={"dtype": "bfloat16"}), [])
    trainable = {n: p for n, p in session.model.named_parameters() if p.requires_grad}
    assert trainable
    for name, parameter in trainable.items():
        assert "mixlora_" in name or "multi_modal_projector.modules_to_save" in name
        assert parameter.dtype == torch.float32
    kept = [
        p for n, p in session.model.named_parameters() if "vision_tower" in n or "lm_head" in n or "embed_tokens" in n
    ]
    assert {p.dtype for p in kept} == {torch.bfloat16}
    wrappers = [m for m in session.model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(wrappers) == 1


def test_full_precision_does_not_depend_on_peft_casting(make_recipe: Callable[..., Recipe]) -> None:
    backbone, _, _ = load_backbone(make_recipe(model={"dtype": "bfloat16"}).model)
    config = MixLoraConfig(target_modules=["q_proj"], task_mix=0.5, tasks=["a"], pairing="conditional")
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {value.dtype for name, value in state.items() if "mixlora_" in name} == {torch.float32}


def test_bf16_backbone_with_fp32_projector_runs(make_recipe: Callable[..., Recipe], batch: dict[str, Any]) -> None:
    session = open_session(make_recipe(model={"dtype": "bfloat16"}), [])
    assert logits(session.model, batch).dtype == torch.bfloat16


def test_merging_is_refused_and_names_the_exporter(session: Session) -> None:
    for merge in (session.model.merge_and_unload, session.model.merge_adapter, layers(session.model)[0].merge):
        with pytest.raises(NotImplementedError, match="qmixlora export"):
            merge()


def test_unload_gives_the_backbone_back(session: Session, batch: dict[str, Any]) -> None:
    with session.model.disable_adapter():
        before = logits(session.model, batch)
    model = session.model.unload()
    with torch.no_grad():
        after = model(**bare(batch)).logits
    assert torch.equal(before, after)


def test_an_unknown_task_gets_the_mean_over_tasks_with_a_warning(
    make_recipe: Callable[..., Recipe], batch: dict[str, Any]
) -> None:
    session = open_session(make_recipe(adapter={"route_on": "task"}), ["color", "digit"])
    randomize_with_centers(session.model)
    model = session.model.eval()
    with pytest.warns(UserWarning, match="nonsense"):
        unknown = logits(model, {**batch, "tasks": ["nonsense"] * 4})
    with torch.no_grad():
        table = model.base_model.mixlora_task["default"]
        table.copy_(table.mean(dim=0).expand_as(table))
    torch.testing.assert_close(unknown, logits(model, {**batch, "tasks": ["color"] * 4}))


def test_task_labels_reach_generate(make_recipe: Callable[..., Recipe], batch: dict[str, Any]) -> None:
    session = open_session(make_recipe(adapter={"route_on": "task"}), ["color", "digit"])
    randomize_with_centers(session.model)
    model = session.model.eval()

    def scores(task: str) -> Tensor:
        with routed_as(model, [task] * 4):
            out = model.generate(
                **bare(batch), max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        result: Tensor = out.logits[1]
        return result

    assert not torch.allclose(scores("color"), scores("digit"))


def test_task_mix_replaces_gates_by_the_running_mean(make_recipe: Callable[..., Recipe], batch: dict[str, Any]) -> None:
    tasks = sorted(set(batch["tasks"]))
    session = open_session(make_recipe(adapter={"task_mix": 1.0}), tasks)
    randomize_with_centers(session.model)
    model, layer = session.model.train(), layers(session.model)[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    model(**inputs)  # nothing known yet: the own gates are used and counted
    context = model.base_model.mixlora_routing
    own = context.current.cache.mixing_matrices[layer, "default"]
    ids = torch.tensor([tasks.index(task) for task in batch["tasks"]])
    for index in range(len(tasks)):
        expected = own[ids == index].mean(dim=0)
        torch.testing.assert_close(layer.mixlora_task_mean["default"][index], expected)
    assert layer.mixlora_task_count["default"].sum() == 4
    means = layer.mixlora_task_mean["default"].clone()
    model(**inputs)
    assert context.current.replaced["default"].all()
    torch.testing.assert_close(context.current.cache.task_means[layer, "default"], means[ids])
    model.eval()
    model(**inputs)
    assert layer.mixlora_task_count["default"].sum() == 8  # evaluation neither replaces nor counts
    assert not context.current.replaced


def test_targets_that_are_not_linear_are_refused(session: Session, backbone: Path) -> None:
    model, _, _ = load_backbone(session.recipe.model)
    with pytest.raises(ValueError, match=r"norm is a LlamaRMSNorm|nn\.Linear"):
        get_peft_model(model, MixLoraConfig(target_modules=["input_layernorm"]))


def test_layers_outside_the_sequence_are_refused(session: Session, batch: dict[str, Any], backbone: Path) -> None:
    model, _, _ = load_backbone(session.recipe.model.model_copy(update={"quantization": "none"}))
    adapted = get_peft_model(model, MixLoraConfig(target_modules=["fc1"], route_on="instruction"))
    with pytest.raises(ValueError, match=r"route_on='instruction' needs layer inputs"):
        logits(adapted, batch)


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no get_input_embeddings"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), MixLoraConfig(target_modules=["0"]))
