"""Every variant goes through every stage; what is refused is refused by name."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qmixlora.backbone.levers.quantized_vision import vision_linears
from qmixlora.bases import own_base
from qmixlora.data import IGNORED, IMAGE, question_about
from qmixlora.errors import UserError
from qmixlora.evaluation import answer_rows
from qmixlora.export.static import read
from qmixlora.mixlora import routed_as
from qmixlora.session import open_model
from qmixlora.training import train

from .case import QUIET, Case, another_picture, logits_of, plain_inputs
from .outcomes import WORKS, outcomes
from .stages import STAGES, routing
from .table import DOCUMENT
from .variant import Variant, variants

VARIANTS = variants()
FAST = ("qwen3_vl", "smolvlm")  # of the ways of images: any shape, and tiles
LONG = (  # with them, one of each kind of decoder, tower and template
    "aria", "gemma3", "gemma4", "internvl", "llava", "mllama", "paligemma", "qwen3_5", "qwen3_vl_moe", *FAST,
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LONG else pytest.mark.exhaustive) for name in VARIANTS],
)
def test_every_stage_works_or_is_refused_by_name(name: str) -> None:
    variant = VARIANTS[name]
    told = outcomes(variant)
    expected = {stage: variant.refusal_of(stage) or WORKS for stage in STAGES}
    wrong = {stage: outcome for stage, outcome in told.items() if expected[stage] not in outcome}
    assert not wrong


@pytest.mark.parametrize("name", FAST)
def test_routed_on_are_the_words_of_the_instruction(name: str, tmp_path: Path) -> None:
    routing(Case(VARIANTS[name], tmp_path))


@pytest.mark.parametrize("stage", ["load", "labels", "look-ahead", "loss", "gradients"])
def test_a_stage_works_in_a_family(stage: str, tmp_path: Path) -> None:
    STAGES[stage](Case(VARIANTS["qwen3_vl"], tmp_path))


@pytest.mark.parametrize("name", ["got_ocr2", "pp_chart2table"])
def test_a_question_without_an_image_that_a_processor_cannot_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no sample without an image"):
        Case(VARIANTS[name], tmp_path).session.collator.prompts([question_about([], "what ?")])


@pytest.mark.long
def test_rows_with_pictures_and_without_are_batched_apart_where_a_model_computes_them_otherwise(tmp_path: Path) -> None:
    """Llama 3.2 Vision: a batch of both raises in the processor or in the model, or changes what has no picture."""
    case = Case(VARIANTS["mllama"], tmp_path)
    session, plain = case.session, question_about([], "which colour ?", task="a")
    rows = [case.rows[0], plain, case.rows[1], plain]
    with pytest.raises(UserError, match="Samples with images are in one batch"):
        session.collator.prompts(rows)
    assert answer_rows(session, rows, batch_size=4) == answer_rows(session, rows, batch_size=1)
    batches = [*session.batches(rows)]
    assert batches == [[plain, plain], [case.rows[0], case.rows[1]]]
    samples = json.loads(case.data.read_text(encoding="utf-8"))
    samples[1] = {"conversations": [{"from": "human", "value": "why ?"}, *samples[1]["conversations"][1:]], "task": "a"}
    case.data.write_text(json.dumps(samples), encoding="utf-8")
    for batch in ({}, {"micro_batch_size": 1, "batch_tokens": 1500}):
        with pytest.raises(UserError, match=r"(?s)data\.train.*train\.micro_batch_size=1"):
            train(case.recipe(train=batch), console=QUIET)
    train(case.recipe("apart", train={"micro_batch_size": 1}), console=QUIET)
    held_out = case.recipe("held", data={"validation": str(case.data)}, train={"micro_batch_size": 1})
    with pytest.raises(UserError, match=r"(?s)data\.validation.*train\.eval_batch_size=1"):
        train(held_out, console=QUIET)


@pytest.mark.parametrize(("name", "is_kept"), [("llava_onevision", False), ("qwen3_vl", True)])
def test_features_that_depend_on_the_pictures_beside_are_not_kept(name: str, is_kept: bool, tmp_path: Path) -> None:
    """LLaVA-OneVision cuts no tiles where a sample shows several pictures."""
    case = Case(VARIANTS[name], tmp_path)
    samples = json.loads(case.data.read_text(encoding="utf-8"))
    turns = [{"from": "human", "value": "<image><image>how ?"}, *samples[1]["conversations"][1:]]
    samples[1] = {"images": ["0.png", "1.png"], "conversations": turns, "task": "a"}
    case.data.write_text(json.dumps(samples), encoding="utf-8")
    recipe = case.recipe(adapter={"projector": "frozen"}, train={"cache_features": True})
    refused = nullcontext() if is_kept else pytest.raises(UserError, match="where a sample shows several")
    with refused:
        train(recipe, console=QUIET)


TALKING = ("qwen3_vl", "kimi_k25", "mllama")
ALSO = set(LONG) - {*TALKING, "paligemma"}  # which has no chat template


@pytest.mark.parametrize("name", [*TALKING, *(pytest.param(name, marks=pytest.mark.long) for name in sorted(ALSO))])
def test_a_second_answer_is_learned_with_the_logits_that_it_is_generated_with(name: str, tmp_path: Path) -> None:
    """Also where layers read latents of the whole cache, or an image's states: a mixture has no instances there."""
    case = Case(VARIANTS[name], tmp_path)
    session, row = case.session, case.rows[0]
    again = [{**turn, "text": f"{turn['text'].replace(IMAGE, '')} again"} for turn in row["turns"]]
    talk = {**row, "turns": [*row["turns"], *again], "tasks": ["a", "b"]}
    batch, (inputs, told) = session.collator([talk]), session.collator.routed_prompts([talk])
    start, end = inputs["input_ids"].shape[1], int((batch["labels"][0] != IGNORED).nonzero().max())
    taught_SV = logits_of(session, {key: value for key, value in batch.items() if key != "labels"})[0]
    ids_S, how = batch["input_ids"][0], {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with routed_as(session.model, **told):
        out = session.model.generate(
            **inputs,
            **how,
            max_new_tokens=end - start + 1,
            prefix_allowed_tokens_fn=lambda _, done_S: [int(ids_S[len(done_S)])],  # the answer that was taught
        )
    assert batch["segments"].max() == 1 and len(out.logits) > 2
    torch.testing.assert_close(torch.cat(out.logits), taught_SV[start - 1 : end], atol=1e-3, rtol=1e-3)


def test_layers_that_read_no_tokens_of_the_pass_take_no_mixture(tmp_path: Path) -> None:
    for name, left_out in (("kimi_k25", {"kv_b_proj"}), ("mllama", {"cross_attn.k_proj", "cross_attn.v_proj"})):
        (tmp_path / name).mkdir()
        anatomy = Case(VARIANTS[name], tmp_path / name).session.anatomy
        rest = set(anatomy.adaptable) - set(anatomy.routable)
        assert rest and {next(end for end in left_out if path.endswith(end)) for path in rest} == left_out


def test_a_projector_inside_the_vision_tower_learns_factors_that_the_base_of_its_exports_has(tmp_path: Path) -> None:
    case = Case(replace(VARIANTS["qwen3_vl"], adapter={"projector": "lora"}), tmp_path)
    STAGES["gradients"](case)
    STAGES["LoRA"](case)
    adapter = read(case.lora)
    assert adapter.updates.keys() == set(case.session.anatomy.targets) and not adapter.modules
    assert own_base(case.lora) is not None


LINEAR_PATCHES = {  # as lfm2_vl
    **dict.fromkeys(("cosmos3_edge", "gemma4", "llama4"), pytest.mark.long),
    **dict.fromkeys(("ernie4_5_vl_moe", "lfm3_vl", "muse_glimmer"), pytest.mark.exhaustive),
}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["lfm2_vl", *(pytest.param(n, marks=mark) for n, mark in LINEAR_PATCHES.items())])
def test_a_tower_in_8_or_4_bits_sees_with_its_rounded_weights(name: str, kind: str, tmp_path: Path) -> None:
    """Also where patches are embedded by a linear layer, to whose dtype the tower casts its pixels."""
    case = Case(VARIANTS[name], tmp_path)
    plain, held = open_model(case.recipe()), open_model(case.recipe(model={"quantize_vision": kind}))
    linears = vision_linears(plain.backbone, plain.anatomy)
    with torch.no_grad():
        for path, linear in linears:
            layer, eye_II = held.backbone.get_submodule(path), torch.eye(linear.in_features)
            assert type(layer) is not type(linear)
            linear.weight.copy_((layer(eye_II) - layer(torch.zeros_like(eye_II))).T)
    seen, other = plain_inputs(plain, case.rows[:1]), [{**case.rows[0], "images": another_picture(case)}]
    torch.testing.assert_close(logits_of(held, seen), logits_of(plain, seen), atol=1e-3, rtol=1e-3)
    last = logits_of(held, seen)[0, -1] - logits_of(held, plain_inputs(held, other))[0, -1]
    assert linears and last.abs().max() > 1e-3, "the picture is unseen"


def test_every_variant_has_its_row_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert not [name for name in VARIANTS if f"| {name} |" not in text]
    assert len(VARIANTS) >= 40


def test_a_variant_is_one_file_of_facts() -> None:
    assert all(isinstance(variant, Variant) for variant in VARIANTS.values())
