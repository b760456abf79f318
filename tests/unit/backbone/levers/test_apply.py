"""The memory levers: frozen weights in another place or precision, and the same loss and gradients."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from qmixlora.backbone import check_quantized, find_anatomy, load_backbone, nf4_linear
from qmixlora.backbone.levers import apply_levers, enable_checkpointing, host_tensors
from qmixlora.backbone.levers.quantized_embedding import quantize_embedding
from qmixlora.backbone.levers.quantized_head import Int8Linear, PiecewiseLinear, quantize_head
from qmixlora.backbone.levers.streaming import Copies, Ring, _fill, _powers_of_two, decoder_layers
from qmixlora.backbone.quantizer import _to_host
from qmixlora.data import load_conversations, load_split
from qmixlora.demo.backbone import make_config
from qmixlora.errors import UserError
from qmixlora.evaluation import answer_rows
from qmixlora.export import Request, export
from qmixlora.loss import supervised_loss
from qmixlora.memory.simulation.loading import loading_peak
from qmixlora.memory.simulation.simulation import LiveStorages, _LiteralsKeepValues, on_meta
from qmixlora.mixlora import device_of
from qmixlora.recipe import Model, Recipe
from qmixlora.session import Session, adapter_config, assemble, open_run, open_session
from qmixlora.training import train

CPU, META = torch.device("cpu"), torch.device("meta")
ALL = {"stream_layers": 3, "offload_embeddings": True, "quantize_lm_head": "nf4"}
LEVERS: list[dict[str, Any]] = [
    {"stream_layers": 4},
    {"stream_layers": 3},
    {"offload_embeddings": True},
    {"quantize_lm_head": "nf4"},
    {"quantize_lm_head": "int8"},
    {"quantize_embeddings": "nf4"},
    {"quantize_embeddings": "int8"},
    ALL,
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A random LLaVA of five decoder layers."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(make_config(processor.tokenizer, layers=5, width=64)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_of(deep: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe with levers; `sections` are other changes."""

    def make(levers: dict[str, Any], **sections: Any) -> Recipe:
        return make_recipe(model={"id": str(deep), **levers}, **sections)

    return make


def step(recipe: Recipe, checkpointing: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the second of two steps with an adapter whose factors all have a gradient."""
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, sorted(set(rows["task"])))
    if checkpointing:
        enable_checkpointing(session)
    model = session.model.train()
    for name, parameter in sorted(model.named_parameters()):
        if "mixlora_B" in name or "lora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.1)
    for start in (0, 4):
        model.zero_grad()
        loss = supervised_loss(model, session.collator([rows[index] for index in range(start, start + 4)]))
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return loss.detach(), gradients


def assert_same_step(one: Recipe, other: Recipe, checkpointing: bool = True) -> None:
    (loss, gradients), (other_loss, other_gradients) = step(one, checkpointing), step(other, checkpointing)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("levers", [*LEVERS[:3], {"stream_layers": 5, "offload_embeddings": True}])
def test_other_places_change_no_bit(levers: dict[str, Any], recipe_of: Callable[..., Recipe]) -> None:
    assert_same_step(recipe_of({}), recipe_of(levers))


@pytest.mark.parametrize(
    "adapter", [{}, {"target_modules": ["q_proj"]}, {"method": "lora", "target_modules": ["v_proj"]}]
)
def test_copies_that_take_long(
    adapter: dict[str, Any], recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, bytes may be there no sooner than they are waited for; here they never are. Where down_proj has no
    adapter, nothing that it saved makes checkpointing compute its layer before its own gradient.
    """
    plain = recipe_of({}, adapter=adapter)
    under_way: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}

    def start(copies: Copies, buffer: Tensor, host: list[Tensor], key: int) -> None:
        buffer.fill_(7)
        under_way[id(copies), key] = buffer, host

    def wait(copies: Copies, key: int) -> None:
        if (id(copies), key) in under_way:
            _fill(*under_way.pop((id(copies), key)))

    monkeypatch.setattr(Copies, "start", start)
    monkeypatch.setattr(Copies, "wait", wait)
    assert_same_step(plain, recipe_of({"stream_layers": 5}, adapter=adapter))
    assert not under_way, "the last to be used is the first again"


def test_streaming_is_right_without_checkpointing_too(recipe_of: Callable[..., Recipe]) -> None:
    assert_same_step(recipe_of({}), recipe_of({"stream_layers": 4}), checkpointing=False)


def test_layers_of_different_sizes() -> None:
    torch.manual_seed(0)
    sizes = [64, 192, 128, 320]

    def layers() -> list[nn.Module]:
        torch.manual_seed(1)
        return [nf4_linear(torch.randn(size, 64), None, CPU) for size in sizes]

    kept, streamed = layers(), layers()
    ring = Ring([[layer] for layer in streamed], CPU)  # type: ignore[list-item]
    for index, layer in enumerate(streamed):
        ring.watch(layer, index)
    assert {len(buffer) for buffer in ring.buffers} == {320 * 32}
    x = torch.randn(3, 64)
    for index in (0, 1, 2, 3, 2, 1, 0, 0, 3, 1):
        assert torch.equal(streamed[index](x), kept[index](x)), index


def test_the_next_layer_is_on_its_way_in_either_direction(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", stream_layers=4))
    ring: Ring = model.get_submodule(anatomy.language).streaming
    for layer, held in ((0, {0, 1}), (1, {1, 2}), (2, {2, 3}), (3, {2, 3}), (2, {1, 2}), (1, {0, 1}), (0, {0, 1})):
        ring.need(layer)
        assert set(ring.held) == held
    ring.need(3)
    ring.need(0)  # generation starts again
    assert set(ring.held) == {0, 1}


def test_where_streamed_weights_lie(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", stream_layers=4))
    check_quantized(model, anatomy)
    layers = list(decoder_layers(anatomy).values())
    assert len(layers) == 5
    storages = [{model.get_submodule(path).weight.untyped_storage()._cdata for path in layer} for layer in layers]
    assert storages[0] == storages[2] != storages[1] == storages[3] and len(storages[0]) == len(storages[1]) == 1
    assert len(storages[4]) == 7, "the last layer is not streamed"
    assert len(host_tensors(model)) == 4
    assert _powers_of_two(101 * 2**20) == [size * 2**20 for size in (64, 32, 4, 1)]
    assert _powers_of_two(3) == [2**20]


def test_the_head_is_its_dequantised_weight() -> None:
    torch.manual_seed(0)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        linear = nn.Linear(64, 40000, dtype=dtype).requires_grad_(False)
        x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
        for kind, error in (("int8", 0.012), ("nf4", 0.12)):
            head = quantize_head(linear, kind, CPU)  # type: ignore[arg-type]
            assert [len(piece(x)[0, 0]) for piece in head.pieces] == [16384, 16384, 7232]
            assert not any(getattr(piece, "support_avx512bf16_for_cpu", False) for piece in head.pieces)
            weight_OI = torch.cat([dequantised(piece) for piece in head.pieces]).to(dtype)
            assert ((weight_OI - linear.weight).float().norm() / linear.weight.float().norm()) < error
            y, reference = head(x), nn.functional.linear(x, weight_OI, linear.bias)
            assert y.dtype == dtype and torch.allclose(y, reference, rtol=near, atol=near)
            weights = torch.randn_like(y)
            (gradient,) = torch.autograd.grad(y, x, weights)
            (expected,) = torch.autograd.grad(reference, x, weights)
            assert torch.allclose(gradient, expected, rtol=near, atol=near * expected.abs().max().item())
            with torch.no_grad():
                assert torch.equal(head.eval()(x), y), "evaluation computes what training does"


def dequantised(piece: Any) -> Tensor:
    if isinstance(piece, Int8Linear):
        return piece.weight.float() * piece.scale
    return bnb.functional.dequantize_4bit(piece.weight.data, piece.weight.quant_state)


def test_embeddings_are_their_dequantised_rows() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        embedding = nn.Embedding(9000, 128, dtype=dtype).requires_grad_(False)
        ids = torch.tensor([[0, 7, 8999], [8192, 8191, 7]])
        for kind, error in (("int8", 0.012), ("nf4", 0.12)):
            table = quantize_embedding(embedding, kind, CPU)  # type: ignore[arg-type]
            whole = table(torch.arange(9000))
            assert whole.dtype == dtype and table(ids).shape == (2, 3, 128)
            assert torch.equal(table(ids), whole[ids])
            assert ((whole - embedding.weight).float().norm() / embedding.weight.float().norm()) < error
            assert sum(t.nbytes for t in table.buffers()) < 9000 * 128 * (1.1 if kind == "int8" else 0.6)
    packed, state = bnb.functional.quantize_4bit(embedding.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(whole, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("levers", LEVERS[3:7])
def test_a_step_with_quantised_parts_is_one_with_dequantised_ones(
    levers: dict[str, Any], recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = step(recipe_of(levers))

    def dequantise(spec: Model) -> Any:
        model, processor, anatomy = load_backbone(spec)
        head: Any = model.get_output_embeddings()
        if isinstance(head, PiecewiseLinear):
            plain = nn.Linear(head.in_features, head.out_features, bias=False)
            plain.weight = nn.Parameter(torch.cat([dequantised(piece) for piece in head.pieces]), requires_grad=False)
            model.set_output_embeddings(plain)
        table: Any = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            weight_VD = table(torch.arange(table.num_embeddings))
            model.set_input_embeddings(nn.Embedding.from_pretrained(weight_VD))
        return model, processor, anatomy

    monkeypatch.setattr("qmixlora.session.load_backbone", dequantise)
    other_loss, other_gradients = step(recipe_of(levers))
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-3, atol=1e-5), name
    monkeypatch.undo()
    assert abs(step(recipe_of({}))[0] - loss) > 1e-6, "quantising them does something"


def test_offloaded_embeddings_stay_where_they_are(deep: Path) -> None:
    model, _, _ = load_backbone(Model(id=str(deep), dtype="float32", offload_embeddings=True, quantization="none"))
    embedding: Any = model.get_input_embeddings()
    assert all("embed_tokens" not in name for name, _ in model.named_parameters())
    nn.Module.to(model, "meta")  # as Trainer would, to its device
    assert embedding.weight.device == CPU and device_of(model) == META
    assert [id(tensor) for tensor in host_tensors(model)] == [id(embedding.weight)]


@pytest.mark.parametrize(
    "lever", [{"quantize_lm_head": "nf4"}, {"quantize_embeddings": "int8"}, {"offload_embeddings": True}]
)
def test_tied_embeddings_are_refused(lever: dict[str, Any], tmp_path: Path, processor: Any) -> None:
    config = make_config(processor.tokenizer, layers=1, width=64)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="one tensor") as caught:
        load_backbone(Model(id=str(tmp_path), dtype="float32", **lever))
    assert f"model.{next(iter(lever))}" in str(caught.value)


def test_more_layers_than_there_are(deep: Path) -> None:
    with pytest.raises(UserError, match=r"6 decoder layers.*has 5"):
        load_backbone(Model(id=str(deep), stream_layers=6))


def test_a_head_that_was_not_asked_for_is_still_found(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", quantize_lm_head="nf4"))
    check_quantized(model, anatomy)
    head: Any = model.get_output_embeddings()
    assert isinstance(head, PiecewiseLinear) and not any(p.support_avx512bf16_for_cpu for p in head.pieces)
    model.lm_head = head.pieces[0]
    with pytest.raises(UserError, match="lm_head is quantised and should not be"):
        check_quantized(model, anatomy)


def test_streamed_weights_go_back_as_they_are_quantised(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: others are told that bitsandbytes quantised the model, which Trainer and PEFT ask for."""
    gone_back: list[Tensor] = []

    def to_host(packed: Tensor) -> Tensor:
        gone_back.append(packed)
        return _to_host(packed)

    monkeypatch.setattr("qmixlora.backbone.quantizer._to_host", to_host)
    plain, placed = (load_backbone(Model(id=str(deep), dtype="float32", **levers))[0] for levers in ({}, ALL))
    for model in (plain, placed):
        assert str(model.quantization_method) == "QuantizationMethod.BITS_AND_BYTES"
        assert type(model.config.quantization_config).__name__ == "BitsAndBytesConfig"
        assert model.is_quantized and model.is_loaded_in_4bit and model.hf_quantizer.is_trainable
    assert len(gone_back) == 3 * 7 and {packed.dtype for packed in gone_back} == {torch.uint8}
    assert plain.config.quantization_config.to_dict() == placed.config.quantization_config.to_dict()


@pytest.mark.parametrize("more", [{}, {"quantization": "none", "stream_layers": 0}])
def test_a_run_with_every_lever(more: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    """Trainer, guard, checkpoint, resume, evaluation: as they are without levers that change numbers."""
    train_section = {"max_steps": 6, "save_every": 3}
    levers = {**ALL, "quantize_lm_head": "none", **more}
    quantization = {key: value for key, value in more.items() if key == "quantization"}
    finals, answers = [], []
    for name, pulled in (("plain", quantization), ("levers", levers)):
        recipe = recipe_of(pulled, train={**train_section, "output": str(tmp_path / name)})
        folder = train(recipe)
        session = open_run(folder)
        rows = load_conversations(recipe.data.test, split="test").select(range(6))
        answers.append(answer_rows(session.model, session.collator, rows, batch_size=3, max_new_tokens=4))
        finals.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert finals[0] == finals[1]
    assert answers[0] == answers[1]
    with contextlib.suppress(FileNotFoundError):
        (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    train(recipe, resume=True)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == finals[1]


def meta_model(folder: Path, levers: dict[str, Any]) -> tuple[Any, Any]:
    """As the planner makes it: the skeleton with NF4 layers without storage, arranged."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    anatomy = find_anatomy(model)
    for path in anatomy.targets:
        linear: Any = model.get_submodule(path)
        model.set_submodule(path, nf4_linear(linear.weight, linear.bias, META))
    apply_levers(model, anatomy, Model(id=str(folder), dtype="float32", **levers), META)
    return model, anatomy


@pytest.mark.parametrize("levers", LEVERS)
def test_a_step_on_meta(levers: dict[str, Any], deep: Path, recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(levers)
    model, anatomy = meta_model(deep, levers)
    assert sum(tensor.untyped_storage().nbytes() for tensor in host_tensors(model)) < 100
    assert all(tensor.device == META for tensor in (*model.parameters(), *model.buffers()))
    tasks = ["plan", "other"]
    config = adapter_config(recipe.adapter, anatomy, tasks)
    session: Session = assemble(recipe, model, None, anatomy, config)  # type: ignore[arg-type]
    enable_checkpointing(session)
    session.model.train()
    ids_BS = torch.ones(2, 16, dtype=torch.long)
    labels_BS = torch.where(torch.arange(16) < 8, -100, ids_BS)
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}
    looked_up = []
    embedding: Any = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, rows: looked_up.append((args[0].device, rows.device)))
    with LiveStorages(model.parameters()):
        with _LiteralsKeepValues():
            loss = supervised_loss(session.model, on_meta(inputs))
        loss.backward()
    assert any(p.grad is not None for p in session.model.parameters())
    assert set(looked_up) == {(CPU if "offload_embeddings" in levers else META, META)}


@pytest.mark.parametrize("levers", [{}, *LEVERS])
def test_what_meta_says_is_held_is_held(levers: dict[str, Any], deep: Path) -> None:
    """The peak of loading counts what lies on the device and on the host afterwards as a loaded model has it."""
    spec = Model(id=str(deep), dtype="float32", **levers)
    model, _ = meta_model(deep, levers)
    peak = loading_peak(model, spec, torch.float32)
    loaded, _, _ = load_backbone(spec)
    held = sum(tensor.nbytes for tensor in host_tensors(loaded))
    streamed = levers.get("stream_layers", 0)
    layer = len(loaded.model.language_model.streaming.buffers[0]) if streamed else 0
    assert peak.host == held + layer
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*loaded.parameters(), *loaded.buffers())
        if tensor.dtype in (torch.uint8, torch.int8) or levers == {}
    }
    assert peak.device > sum(storages.values())
    wider = loading_peak(model, spec, torch.float16)
    assert wider.host > peak.host and wider.device == peak.device


def test_loading_peak_by_hand(deep: Path) -> None:
    """Without levers: all that stays, and the largest NF4 weight in 32, in 4 bits and its scales."""
    model, anatomy = meta_model(deep, {})
    spec = Model(id=str(deep), dtype="float32")
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    largest = max(model.get_submodule(path).weight.quant_state.shape.numel() for path in anatomy.targets)
    scales = loading_peak(model, spec, torch.float32).device - weights - int(largest * (4 + 0.5 + 1 / 16))
    per_layer = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert scales == sum(s.absmax.nbytes + 16 * 4 + s.state2.absmax.nbytes + 256 * 4 for s in per_layer)
    model_of_16_bits = spec.model_copy(update={"quantization": "none", "offload_embeddings": True})
    arranged, _ = meta_model(deep, {"offload_embeddings": True})
    embedding: Any = arranged.get_input_embeddings()
    difference = (
        loading_peak(arranged, model_of_16_bits, torch.float32).device
        - loading_peak(arranged, spec.model_copy(update={"offload_embeddings": True}), torch.float32).device
    )
    assert difference == embedding.weight.numel() * 4, "it is on the device before it is taken off"


def test_peft_models_know_their_device(recipe_of: Callable[..., Recipe]) -> None:
    session = open_session(recipe_of(ALL), [])
    assert isinstance(session.model, PeftModel) and device_of(session.model) == CPU


def test_a_merged_checkpoint_is_opened_without_the_levers_of_its_run(
    deep: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    """What stock transformers loads: nothing quantised, nothing elsewhere."""
    folder = tmp_path / "merged"
    shutil.copytree(deep, folder)
    (folder / "recipe.yaml").write_text(recipe_of(ALL).to_yaml(), encoding="utf-8")
    model: Any = open_run(folder).model
    assert type(model.get_output_embeddings()) is nn.Linear and host_tensors(model) == []


@pytest.mark.parametrize("base", ["original", "nf4"])
def test_a_run_with_levers_is_exported(base: Any, recipe_of: Callable[..., Recipe]) -> None:
    """Streamed layers are not read for it; a head in 4 bits is merged as the 16-bit one that the checkpoint has."""
    folder = train(recipe_of(ALL, train={"max_steps": 2}))
    request = Request(tasks=("color",), forms=("lora", "merged"), base=base, polish=0, samples=2)
    reports = export(folder, request, Console(quiet=True))
    assert [made["form"] for made in reports] == ["lora", "merged"]
    assert reports[1]["logits_difference"] < 1e-3
