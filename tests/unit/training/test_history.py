"""Going on with a run: what differs is listed, what would change its checkpoints' meaning is refused by name."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from qmixlora.data import load_split
from qmixlora.errors import UserError
from qmixlora.evaluation.results import blind_guess
from qmixlora.files import read_log
from qmixlora.recipe import Recipe, edited, load_recipe, load_run_recipe
from qmixlora.training import train
from qmixlora.training.history import changes_of, refused

from .card import weights
from .helpers import QUIET


@pytest.fixture(scope="module")
def made(make_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a run of four steps, finished."""
    recipe = make_recipe_in(tmp_path_factory.mktemp("made"), train={"save_every": 2})
    train(recipe, console=QUIET)
    return recipe


@pytest.fixture
def run(made: Recipe, tmp_path: Path) -> Recipe:
    """The same run in a folder of the test's own."""
    folder = Path(shutil.copytree(made.train.output, tmp_path / "run"))
    return edited(made, [f"train.output={folder}"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REFUSED = [
    ("adapter.alpha=32", "adapter.alpha: 4.0 -> 32.0"),
    ("adapter.num_factors=8", "adapter.num_factors: 4 -> 8"),
    ("adapter.projector=frozen", "adapter.projector: full -> frozen"),
    ("train.learning_rate=1e-5", "train.learning_rate: 0.01 -> 1e-05"),
    ("train.seed=1", "train.seed: 0 -> 1"),
    ("train.micro_batch_size=2", "train.micro_batch_size: 4 -> 2"),
    ("train.optimizer=adamw_8bit", "train.optimizer: adamw -> adamw_8bit"),
    ("model.dtype=bfloat16", "model.dtype: float32 -> bfloat16"),
    ("model.quantization=none", "model.quantization: nf4 -> none"),
    ("data.max_image_tokens=2", "data.max_image_tokens: None -> 2"),
    ("data.special_tokens=[<box>]", "data.special_tokens: [] -> ['<box>']"),
    ("data.group_by_length=step", "data.group_by_length: False -> step"),  # an epoch would go on in another order
]


@pytest.mark.parametrize(("override", "words"), REFUSED)
def test_what_changes_the_meaning_of_checkpoints_is_refused_by_name(run: Recipe, override: str, words: str) -> None:
    folder = Path(run.train.output)
    before = content(folder)
    with pytest.raises(UserError, match="--init-from") as error:
        train(edited(run, [override, "train.max_steps=6"]), resume=True, console=QUIET)
    assert words in str(error.value) and "max_steps" not in str(error.value)
    assert content(folder) == before


MAY = [
    ["train.max_steps=9"],
    ["train.epochs=3"],
    ["train.micro_batch_size=2", "train.gradient_accumulation=2"],
    ["train.checkpointing.every_n_layers=2"],
    ["train.log_every=2", "train.save_every=1", "train.keep_checkpoints=5"],
    ["model.offload_embeddings=true", "train.loss_chunk=8", "export.samples=3"],
    ["data.test=null", "train.on_nan=skip", "train.max_minutes=90"],
]


@pytest.mark.parametrize("overrides", MAY)
def test_what_may_change_is_not_refused(made: Recipe, overrides: list[str]) -> None:
    new = edited(made, overrides)
    changes = changes_of(made, new)
    assert {change.path for change in changes} == {override.partition("=")[0] for override in overrides}
    assert refused(changes, new, made) == []


def test_what_may_change_is_told_and_applied_and_written_down(run: Recipe) -> None:
    folder, screen = Path(run.train.output), io.StringIO()
    train(edited(run, ["train.max_steps=6"]), resume=True, console=Console(file=screen, width=200))
    assert "Differs from the run so far: train.max_steps: 4 -> 6" in screen.getvalue()
    as_run, text = load_recipe(str(folder / "recipe.yaml")), (folder / "recipe.yaml").read_text()
    assert as_run.train.max_steps == 6
    for words in ("started at step 0", "finished at step 4", "resumed at step 4", "train.max_steps: [4, 6]"):
        assert words in text.partition("# History")[2]
    history = read_log(folder / "history.jsonl")
    assert [record["event"] for record in history] == ["started", "finished", "resumed", "finished"]
    assert {"torch", "transformers", "peft"} <= history[2]["versions"].keys()


def test_other_libraries_are_told(run: Recipe) -> None:
    path = Path(run.train.output) / "history.jsonl"
    records = read_log(path)
    for record in records:
        record["versions"]["peft"] = "0.0.1"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    screen = io.StringIO()
    train(edited(run, ["train.max_steps=5"]), resume=True, console=Console(file=screen, width=200))
    assert "peft: 0.0.1 -> " in screen.getvalue()


def test_other_data_is_refused_and_moved_data_is_not(run: Recipe, data: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved")) / "train.json"
    rows = json.loads(moved.read_text())
    at_moved = [f"data.train={moved}", "train.max_steps=5"]
    moved.write_text(json.dumps(rows[::-1]))
    before = content(Path(run.train.output))
    with pytest.raises(UserError, match="training data is not what the run began with"):
        train(edited(run, at_moved), resume=True, console=QUIET)
    assert content(Path(run.train.output)) == before
    moved.write_text(json.dumps(rows))
    train(edited(run, at_moved), resume=True, console=QUIET)


def test_other_weights_are_refused_and_moved_weights_are_not(run: Recipe, backbone: Path, tmp_path: Path) -> None:
    folder, moved = Path(run.train.output), Path(shutil.copytree(backbone, tmp_path / "moved"))
    assert load_run_recipe(folder).model.learned_on["weights"]
    go_on = edited(run, [f"model.id={moved}", "train.max_steps=5"])
    begin = edited(run, [f"model.id={moved}", "train.max_steps=1", f"train.output={tmp_path / 'new'}"])
    tensors = load_file(moved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, moved / "model.safetensors", {"format": "pt"})
    before = content(folder)
    for recipe, how in ((go_on, {"resume": True}), (begin, {"init_from": folder})):
        with pytest.raises(UserError, match=r"not what the run in .* learned on: weights\."):
            train(recipe, console=QUIET, **how)
    assert content(folder) == before
    train(begin, console=QUIET)  # with an adapter of its own
    shutil.copyfile(backbone / "model.safetensors", moved / "model.safetensors")
    train(go_on, resume=True, console=QUIET)
    assert load_run_recipe(folder).model.id == str(moved)


def test_a_model_that_reads_in_another_way_is_refused_by_what_is_other(
    run: Recipe, backbone: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(backbone, tmp_path / "moved"))
    template = moved / "chat_template.jinja"
    template.write_text("Please " + template.read_text())
    go_on = edited(run, [f"model.id={moved}", "train.max_steps=5"])
    with pytest.raises(UserError, match=r"not what the run in .* learned on: chat template\."):
        train(go_on, resume=True, console=QUIET)
    shutil.copyfile(backbone / template.name, template)
    train(go_on, resume=True, console=QUIET)


def test_a_run_of_before_bases_were_recorded_goes_on_and_records_its_own(run: Recipe) -> None:
    file = Path(run.train.output) / "recipe.yaml"
    values = load_run_recipe(file.parent).model_dump()
    own = values["model"].pop("learned_on")
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model\.id: "):  # what cannot be compared is not taken for the same
        train(edited(run, ["model.id=elsewhere", "train.max_steps=5"]), resume=True, console=QUIET)
    train(edited(run, ["train.max_steps=5"]), resume=True, console=QUIET)
    assert load_run_recipe(file.parent).model.learned_on == own


def test_a_finished_run_says_that_nothing_is_left(run: Recipe) -> None:
    folder, screen = Path(run.train.output), io.StringIO()
    before = content(folder)
    assert train(run, resume=True, console=Console(file=screen, width=200)) == folder
    assert "Nothing is left to do" in screen.getvalue() and content(folder) == before


def test_a_run_that_was_given_more_steps_and_stopped_is_not_finished(run: Recipe) -> None:
    """Its folder has the adapter of its first end."""
    folder = Path(run.train.output)
    longer = edited(run, ["train.max_steps=6"])
    train(longer, resume=True, console=QUIET)
    history = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(history[:-1]))
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    train(longer, resume=True, console=QUIET)
    assert read_log(folder / "history.jsonl")[-1]["step"] == 6


@pytest.mark.parametrize(
    ("fewer", "steps"), [(["train.max_steps=3"], 3), (["train.max_steps=null", "train.epochs=0.01"], 1)]
)
def test_a_finished_run_is_not_given_fewer_steps(run: Recipe, fewer: list[str], steps: int) -> None:
    folder = Path(run.train.output)
    before = content(folder)
    with pytest.raises(UserError, match=f"finished, at step 4, and of {steps} steps none are left"):
        train(edited(run, fewer), resume=True, console=QUIET)
    assert content(folder) == before


def test_what_was_made_of_an_earlier_adapter_is_set_aside(run: Recipe) -> None:
    folder, screen = Path(run.train.output), io.StringIO()
    made = (
        "evaluation.json", "predictions-validation.jsonl", "interference.json", "interference-test.json",
        "exports/a-lora/fidelity.json", "figures/interference.png", "unscored.jsonl",
    )  # fmt: skip
    stays = ("evaluation-test-backbone.json", "predictions-test-backbone.jsonl")
    for name in (*made, *stays):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    longer = edited(run, ["train.max_steps=5"])
    train(longer, resume=True, console=Console(file=screen, width=500))
    aside = folder / "earlier" / "step-4"
    assert all((aside / name).read_text() == name and not (folder / name).exists() for name in made)
    assert all((folder / name).is_file() for name in stays)
    moved = sorted({name.split("/")[0] for name in made})
    assert f"Set aside: {', '.join(moved)} of the adapter so far: now in {aside}." in screen.getvalue()


def test_what_was_made_of_the_same_adapter_stays(run: Recipe) -> None:
    """Such as where the end of a run is taken again."""
    folder = Path(run.train.output)
    (folder / "evaluation.json").write_text("{}")
    history = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(history[:-1]))
    train(run, resume=True, console=QUIET)
    assert (folder / "evaluation.json").is_file() and not (folder / "earlier").exists()
    (folder / "evaluation.json").unlink()
    train(edited(run, ["train.max_steps=5"]), resume=True, console=QUIET)
    assert not (folder / "earlier").exists()  # nothing was to set aside


def test_a_new_run_begins_with_what_another_learned(run: Recipe, tmp_path: Path) -> None:
    other = Path(run.train.output)
    new = edited(run, [f"train.output={tmp_path / 'new'}", "train.learning_rate=1e-30", "train.max_steps=1"])
    folder = train(new, init_from=other, console=QUIET)
    own, expected = weights(folder), weights(other)
    trained = [name for name in own if "center" not in name]
    assert all(torch.allclose(own[name], expected[name], atol=1e-12) for name in trained)
    assert read_log(folder / "history.jsonl")[0]["init_from"] == str(other)
    first = load_file(folder / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    assert any("mixlora_B" in name and tensor.abs().sum() > 0 for name, tensor in first.items())


def test_an_adapter_of_another_kind_is_refused_by_name(run: Recipe, tmp_path: Path) -> None:
    new = edited(run, [f"train.output={tmp_path / 'new'}", "adapter.num_factors=8", "adapter.dropout=0.1"])
    with pytest.raises(UserError, match=r"adapter\.num_factors: 4 -> 8") as error:
        train(new, init_from=Path(run.train.output), console=QUIET)
    assert "dropout" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_run_of_before_there_was_a_history_goes_on(run: Recipe) -> None:
    folder: Any = Path(run.train.output)
    (folder / "history.jsonl").unlink()
    before = content(folder)
    train(run, resume=True, console=QUIET)
    assert content(folder) == before  # it is finished, as its last checkpoint says
    train(edited(run, ["train.max_steps=5"]), resume=True, console=QUIET)
    assert [record["event"] for record in read_log(folder / "history.jsonl")] == ["resumed", "finished"]


def test_a_run_whose_data_has_changed_is_asked_nothing_of_what_it_held_out_then(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "data")) / "train.json"
    recipe = make_recipe(data={"train": str(own), "validation": None, "test": 0.2}, train={"max_steps": 1})
    run = train(recipe, console=QUIET)
    kept = load_run_recipe(run)
    assert not changes_of(kept, recipe) and len(load_split(kept.data, "test"))
    own.write_text(json.dumps(json.loads(own.read_text())[::-1]))
    for ask in (load_split, lambda _, split: blind_guess(run, split)):
        with pytest.raises(UserError, match="not those that the run held out"):
            ask(kept.data, "test")


def test_a_run_of_an_earlier_release_does_not_know_what_it_held_out(made: Recipe, run: Recipe) -> None:
    file = Path(run.train.output) / "recipe.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "held_out" not in line))
    assert (
        load_run_recipe(file.parent).data.held_out is None
        and load_run_recipe(Path(made.train.output)).data.held_out == {}
    )
