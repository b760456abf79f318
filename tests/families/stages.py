"""The stages of a model's way through qmixlora, run over every variant.

A stage returns where all is right, raises UserError where the model is refused there, and anything else where
something is wrong.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from qmixlora.backbone import make_skeleton, shares_of
from qmixlora.backbone.image_tokens import placeholder_of
from qmixlora.backbone.image_tokens.families import family_of
from qmixlora.bases import own_base
from qmixlora.data import IGNORED
from qmixlora.data.formats import IMAGE
from qmixlora.evaluation import answer_rows
from qmixlora.export.static import learned_by, lora_session, read
from qmixlora.files import read_log
from qmixlora.loss import supervised_loss
from qmixlora.memory import plan
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation.batch import batches_of
from qmixlora.session import open_model, open_run, open_session, open_tuned_run
from qmixlora.training import train
from qmixlora.training.probe import probe

from .case import QUIET, TASKS, Case, another_picture, logits_of, plain_inputs, routed_on, supervised_of, tuned_inputs


def load(case: Case) -> None:
    """Every linear layer of the decoder but indexers, and nothing else, is NF4; the rest has the recipe's dtype."""
    session = case.session
    backbone, anatomy = session.backbone, session.anatomy
    quantised = {name for name, module in backbone.named_modules() if isinstance(module, Linear4bit)}
    wrapped = {name.replace(".base_layer", "") for name in quantised}
    assert wrapped == set(anatomy.in_nf4) and (wrapped or case.variant.model)
    decoder = backbone.get_submodule(anatomy.language)
    linear = {f"{anatomy.language}.{n}" for n, m in decoder.named_modules() if isinstance(m, Linear4bit)}
    assert linear == quantised
    shares = shares_of(*make_skeleton(config_of(session.recipe.model), session.recipe.model))
    assert shares.of_neither < 0.05 or case.variant.model, shares
    floats = {p.dtype for p in backbone.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}


def labels(case: Case) -> None:
    """What is supervised is every answer and its end, and nothing else."""
    collator = case.session.collator
    batch = collator(case.rows)
    for row, ids_S, labels_S in zip(case.rows, batch["input_ids"], batch["labels"], strict=True):
        supervised = ids_S[labels_S != IGNORED]
        assert torch.equal(supervised, labels_S[labels_S != IGNORED])
        text = collator.processor.tokenizer.decode(supervised[:-1])
        assert text == row["turns"][-1]["text"] and int(supervised[-1]) in collator.stop_ids, text


def routing(case: Case) -> None:
    """Routed on are the tokens of the same question without its picture, white space beside it apart."""
    session, collator = case.session, case.session.collator
    decode = collator.processor.tokenizer.decode
    for row in case.rows:
        batch = collator([row])
        routed = decode(batch["input_ids"][0][routed_on(session, batch)[0]])
        alone = {**row, "images": [], "turns": [{**t, "text": t["text"].replace(IMAGE, "")} for t in row["turns"]]}
        asked = decode(collator.tokens(alone["turns"][:-1], prompt=True))
        assert routed.split() == asked.split() or "".join(routed.split()) == "".join(asked.split()), (routed, asked)


def look_ahead(case: Case) -> None:
    """Another last answer token changes no logits before it; another picture does."""
    session = case.session
    batch = tuned_inputs(session, case.rows[:1])
    changed = dict(batch)
    end = int(batch["attention_mask"][0].sum()) - 1
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][0, end] = (batch["input_ids"][0, end] + 1) % 256
    first, second = (logits_of(session, inputs)[0, :end] for inputs in (batch, changed))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    other = tuned_inputs(session, [{**case.rows[0], "images": another_picture(case)}])
    assert (logits_of(session, other)[0, -1] - logits_of(session, batch)[0, -1]).abs().max() > 1e-5, (
        "the picture is unseen"
    )


def loss(case: Case) -> None:
    """The loss is that of the model's own forward."""
    session = case.session
    batch = session.collator(case.rows)
    with torch.no_grad():
        own = session.model(**batch, use_cache=False).loss
        ours = supervised_loss(session.model, batch)
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


def gradients(case: Case) -> None:
    """A step reaches every trainable tensor."""
    model = case.session.model
    model.train()
    supervised_loss(model, case.session.collator(case.rows)).backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    model.zero_grad()
    model.eval()
    assert not dead, f"no gradient reaches {dead[:3]}, {len(dead)} in all"


def reload(case: Case) -> None:
    """A saved adapter has the logits that it had."""
    session = case.session
    folder = case.folder / "saved"
    session.model.save_pretrained(str(folder / "adapter"))
    (folder / "recipe.yaml").write_text(session.recipe.to_yaml())
    again = open_run(folder)
    batch = session.collator(case.rows)
    torch.testing.assert_close(supervised_of(again, batch), supervised_of(session, batch), atol=0, rtol=0)


def answers(case: Case) -> None:
    """Answers of a trained run are the same one by one, and four at a time under padding."""
    session = open_run(case.run)
    rows = case.rows
    assert answer_rows(session, rows, batch_size=4) == answer_rows(session, rows, batch_size=1)


def padding(case: Case) -> None:
    """Padding on the left, and neighbours, change no logits of a prompt."""
    session = case.session
    together = session.collator.prompts(case.rows)
    for index, row in enumerate(case.rows):
        alone = session.collator.prompts([row])
        with torch.no_grad():
            both = [session.model(**inputs, use_cache=False).logits for inputs in (together, alone)]
        torch.testing.assert_close(both[0][index, -1], both[1][0, -1], atol=1e-3, rtol=1e-3)


def stock_lora(case: Case) -> None:
    """An exported LoRA in stock PEFT on its base is the model with the update in its weights and the new projector."""
    folder = case.lora
    session = open_model(case.recipe(model={"quantization": "none"}))
    batch = plain_inputs(session, case.rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*key")
        stock = AutoModelForImageTextToText.from_pretrained(own_base(folder) or case.model, dtype=torch.float32)
        stock = PeftModel.from_pretrained(stock, str(folder)).eval()
    adapter = read(folder)
    with torch.no_grad():
        before = session.model(**batch, use_cache=False).logits
        for layer, update in adapter.updates.items():
            session.model.get_submodule(layer).weight += update.up_OK @ update.down_KI
        for name, value in learned_by(open_tuned_run(case.run).model).projector.items():
            session.model.get_parameter(name).copy_(value)
        by_hand, computed = session.model(**batch, use_cache=False).logits, stock(**batch, use_cache=False).logits
    torch.testing.assert_close(computed, by_hand, atol=1e-3, rtol=1e-3)
    assert (by_hand - before).abs().max() > 1e-3


def stock_merged(case: Case) -> None:
    """A merged checkpoint in stock transformers is the NF4 backbone, its experts in 16 bits, with the exported LoRA."""
    session, keep = open_tuned_run(case.run), [*case.session.anatomy.experts_in_nf4]
    adapter = replace(read(case.lora), in_base=learned_by(session.model).projector)
    expected = lora_session(open_model(case.recipe(model={"keep": keep})), adapter)
    stock, info = AutoModelForImageTextToText.from_pretrained(case.merged, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    batch = plain_inputs(expected, case.rows)
    with torch.no_grad():
        computed = stock.eval()(**batch, use_cache=False).logits
    torch.testing.assert_close(computed, logits_of(expected, batch), atol=2e-3, rtol=2e-3)


def bfloat16(case: Case) -> None:
    """A step in bfloat16, the default."""
    session = open_session(case.recipe(model={"dtype": "bfloat16"}), TASKS)
    value = supervised_loss(session.model.train(), session.collator(case.rows))
    value.backward()
    assert value.isfinite()


def plan_on_data(case: Case) -> None:
    """Data at hand is measured, and planned."""
    recipe = case.recipe()
    batches = batches_of(recipe, config_of(recipe.model), None)
    assert not batches[0].unmeasured, batches[0].unmeasured
    longest = case.session.collator(case.rows)["input_ids"].shape[1]
    assert max(batch.tokens for batch in batches) == longest
    assert plan(recipe, batch=batches[0]).peak > 0


def plan_tokens(case: Case) -> None:
    """Samples of a length are planned without data."""
    assert plan(case.recipe(), tokens=1400).peak > 0


def probed(case: Case) -> None:
    """Two real steps take no more than a tenth above what was planned, and not much less (the models are tiny), but
    for the batch, of which a CPU makes no copy.
    """
    recipe = case.recipe()
    planned = plan(recipe, batch=batches_of(recipe, config_of(recipe.model), None)[0])
    batch = sum(value.nbytes for value in planned.batch.inputs.values() if isinstance(value, torch.Tensor))
    measured = probe(recipe, planned)
    least, most = -0.15 * measured.measured - batch, 0.1 * measured.measured
    assert least <= measured.residual <= most, (measured.planned, measured.measured, batch)


def picture_limit(case: Case) -> None:
    """No image takes more tokens than the least that the family can keep to."""
    config = config_of(case.recipe().model)
    least = family_of(config, "model.id", None, case.session.collator.processor).smallest(config)
    session = open_model(case.recipe(data={"max_image_tokens": least}))
    ids_BS = session.collator(case.rows)["input_ids"]
    assert int((ids_BS == placeholder_of(config)).sum(dim=1).max()) <= least
    supervised_loss(session.model, session.collator(case.rows))


def cached(case: Case) -> None:
    """A run on cached features has the losses of the run without."""
    losses = []
    for name in (False, True):
        recipe = case.recipe(f"cached-{name}", adapter={"projector": "frozen"}, train={"cache_features": name})
        log = read_log(train(recipe, console=QUIET) / "metrics.jsonl")
        losses.append([record["loss"] for record in log if "loss" in record])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4), losses


STAGES: dict[str, Callable[[Case], None]] = {
    "load": load,
    "labels": labels,
    "routing": routing,
    "look-ahead": look_ahead,
    "loss": loss,
    "gradients": gradients,
    "reload": reload,
    "answers": answers,
    "padding": padding,
    "LoRA": stock_lora,
    "merged": stock_merged,
    "bfloat16": bfloat16,
    "plan data": plan_on_data,
    "plan tokens": plan_tokens,
    "probe": probed,
    "limit": picture_limit,
    "cached": cached,
}
