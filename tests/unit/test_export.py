"""The exporter on a small trained run: stock libraries load what it writes, and compute what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qmixlora.export.exporter as exporter_module
import qmixlora.export.merge as merge_module
from qmixlora.data import indices_by_task, load_split
from qmixlora.errors import CheckError, UserError
from qmixlora.evaluation.answers import on_device
from qmixlora.export import Request, export, exported_tasks
from qmixlora.export.measurement import measure, measure_live
from qmixlora.export.merge import Merge, nf4_round_trip
from qmixlora.export.polish import START, polish
from qmixlora.export.static import learned_by, lora_session, read, taken_off
from qmixlora.export.targets import make_targets, safe_name
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import open_model, open_run
from qmixlora.training import train

QUIET = Console(quiet=True)
TASKS = ("color", "count")
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def make_run(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of a few steps on the random backbone, large enough steps that its mixture is far from its mean."""
    made: dict[str, Path] = {}

    def make(name: str = "embedding", **adapter: Any) -> Path:
        if name not in made:
            values = {
                "model": {"id": str(backbone), "dtype": "float32"},
                "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0, **adapter},
                "data": {"train": str(data / "train.json"), "test": str(data / "test.json"), "max_length": 128},
                "train": {
                    "output": str(tmp_path_factory.mktemp("runs") / name),
                    "max_steps": 12,
                    "micro_batch_size": 20,
                    "gradient_accumulation": 1,
                    "learning_rate": 3e-2,
                    "max_new_tokens": 4,
                },
                "export": {"polish": 0},
            }
            made[name] = train(Recipe.model_validate(values), console=QUIET)
        return made[name]

    return make


@pytest.fixture
def run(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of its own to export from."""
    return Path(shutil.copytree(make_run(), tmp_path / "run"))


def rows_of(folder: Path, task: str, split: str = "test") -> Any:
    rows = load_split(load_recipe(str(folder / "recipe.yaml")).data, split)
    return rows.select(indices_by_task(rows)[task])


def logits(session: Any, rows: Any) -> Tensor:
    inputs = on_device(session.collator(list(rows)), torch.device("cpu"))
    inputs.pop("labels")
    with torch.no_grad():
        return session.model(**inputs, use_cache=False).logits


def elsewhere(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in a process of its own that must not import qmixlora; what it prints last, as JSON."""
    guard = "\nimport sys\nassert not any(name.split('.')[0] == 'qmixlora' for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", script + guard, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def save_inputs(session: Any, rows: Any, path: Path) -> None:
    inputs = session.collator(list(rows))
    save_file({name: value for name, value in inputs.items() if name in MODEL_INPUTS}, path)


MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values")
STOCK_PEFT = """
import json, sys, warnings, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
base, adapter, inputs, out = sys.argv[1:5]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*(missing|unexpected).*key")  # as PEFT warns of them
    model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, out)
print(json.dumps({"method": model.peft_config["default"].peft_type}))
"""
STOCK_TRANSFORMERS = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, inputs, out = sys.argv[1:4]
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(inputs)).logits}, out)
print(json.dumps({name: sorted(map(str, found)) for name, found in info.items()}))
"""


def test_an_exported_lora_is_stock_peft_and_the_oracle(run: Path, backbone: Path, tmp_path: Path) -> None:
    (made,) = export(run, Request(tasks=("color",)), QUIET)
    folder = run / "exports" / "color-lora"
    assert made == json.loads((folder / "fidelity.json").read_text()) and exported_tasks(folder) == ["color"]
    card = (folder / "README.md").read_text()
    assert "base_model:" in card and "# LoRA for color" in card and "More Information Needed" not in card
    live = open_run(run)
    pools = learned_by(live.model).pools
    config = live.model.peft_config["default"]
    with safe_open(run / "routing.safetensors", "pt") as file:
        index = json.loads(file.metadata()["tasks"]).index("color")
        mixes = {layer: file.get_tensor(f"{layer}.mean")[index] for layer in pools}
    exported = read(folder)
    assert exported.updates.keys() == pools.keys() and len(exported.modules) == 4
    for layer, update in exported.updates.items():
        oracle = config.scaling * pools[layer][1].T @ mixes[layer].T @ pools[layer][0]  # s B^T C^T A
        torch.testing.assert_close(update.up_OK @ update.down_KI, oracle, atol=1e-5, rtol=0)

    rows = rows_of(run, "color")
    save_inputs(live, rows, tmp_path / "inputs.safetensors")
    found = elsewhere(STOCK_PEFT, backbone, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors")
    assert found["method"] == "LORA"
    # the same by hand: the original base with every update added to its weights
    session = open_model(unquantised(run))
    model = session.model
    with torch.no_grad():
        for layer, update in exported.updates.items():
            model.get_submodule(layer).weight += update.up_OK @ update.down_KI
        for name, value in exported.modules.items():
            model.get_parameter(name).copy_(value)
    expected = logits(session, rows)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, atol=1e-4, rtol=0)


def unquantised(run: Path) -> Recipe:
    recipe = load_recipe(str(run / "recipe.yaml"))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "none"})})


def test_keys_are_those_that_servers_expect(run: Path) -> None:
    """vLLM strips `base_model.model.`, maps `model.language_model.` to `language_model.model.` and wants the rest to be
    lora_A.weight and lora_B.weight on linear layers, with no module saved whole.
    """
    export(run, Request(tasks=("color",), projector_rank=3), QUIET)
    folder = run / "exports" / "color-lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["lora_alpha"] == config["r"] == 4
    keys = set(load_file(folder / "adapter_model.safetensors"))
    language = {key for key in keys if key.startswith("base_model.model.model.language_model.layers.")}
    projector = {key for key in keys if key.startswith("base_model.model.model.multi_modal_projector.linear_")}
    assert language | projector == keys and len(language) == 2 * 14 and len(projector) == 2 * 2
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_the_projector_as_low_rank_says_what_it_keeps(run: Path) -> None:
    (full,) = export(run, Request(tasks=("color",)), QUIET)
    assert any("--projector-rank" in note for note in full["notes"])
    (cut,) = export(run, Request(tasks=("color",), projector_rank=2), QUIET)
    assert cut["notes"] == []
    kept = cut["kept"]["projector"]["layers"]
    weight, bias = "model.multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.bias"
    assert 0 < kept[weight] < 1 and kept[bias] == 0.0
    state = learned_by(open_run(run).model)
    change = state.modules[weight] - state.originals[weight]
    left, values, right = torch.linalg.svd(change)
    update = read(run / "exports" / "color-lora").updates["model.multi_modal_projector.linear_1"]
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(update.up_OK @ update.down_KI, best, atol=1e-4, rtol=0)
    assert kept[weight] == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-3)


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_a_merged_checkpoint_is_stock_transformers(run: Path, backbone: Path, tmp_path: Path, base: Any) -> None:
    lora, merged = export(run, Request(tasks=("color",), forms=("lora", "merged"), base=base), QUIET)
    folder = run / "exports" / "color-merged"
    assert (lora["form"], merged["form"], merged["base"]) == ("lora", "merged", base)
    assert merged["exact_match"]["lora"] == lora["exact_match"]["lora"] and merged["agreement"].keys() == {
        "lora",
        "merged",
    }
    copied = [p for p in backbone.iterdir() if p.suffix != ".safetensors"]
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in copied) and len(copied) >= 5
    with safe_open(backbone / "model.safetensors", "pt") as old, safe_open(folder / "model.safetensors", "pt") as new:
        assert set(old.keys()) == set(new.keys())

    session = open_run(run) if base == "nf4" else open_model(unquantised(run))
    static = lora_session(session, read(run / "exports" / "color-lora"))
    rows = rows_of(run, "color")
    static.model.eval()
    expected = logits(static, rows)
    save_inputs(session, rows, tmp_path / "inputs.safetensors")
    info = elsewhere(STOCK_TRANSFORMERS, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors")
    assert not any(info.values()), info
    found = load_file(tmp_path / "out.safetensors")["logits"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - logits(open_model(unquantised(run)), rows)).abs().max() > 0.1  # the update is no trifle


def test_shards_and_names_of_older_checkpoints(run: Path, backbone: Path, tmp_path: Path) -> None:
    """A base in several shards under the names that LLaVA has on the hub (`language_model.model.layers...`)."""
    old = tmp_path / "old"
    shutil.copytree(backbone, old)
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    names = {
        name: name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head", "language_model.lm_head")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal", "multi_modal")
        if not name.startswith("language_model.")
        else name
        for name in tensors
    }
    weight_map = {}
    for number, start in enumerate(range(0, len(names), 20)):
        part = {names[name]: tensors[name] for name in list(names)[start : start + 20]}
        save_file(part, old / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (old / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert any(name.startswith("language_model.model.layers.") for name in weight_map)

    export(run, Request(tasks=("color",), forms=("lora", "merged")), QUIET)
    adapter = read(run / "exports" / "color-lora")
    spec = load_recipe(str(run / "recipe.yaml")).model.model_copy(update={"id": str(old)})
    Merge(adapter, spec, "nf4").write(tmp_path / "merged")
    same = load_file(run / "exports" / "color-merged" / "model.safetensors")
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    written = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == weight_map.keys()
    for name, tensor in same.items():
        assert torch.equal(written[names[name]], tensor), name


def test_every_module_must_find_its_place(run: Path, tmp_path: Path) -> None:
    export(run, Request(tasks=("color",)), QUIET)
    adapter, spec = read(run / "exports" / "color-lora"), load_recipe(str(run / "recipe.yaml")).model
    renamed = {name.replace("layers.0", "layers.7"): update for name, update in adapter.updates.items()}
    with pytest.raises(UserError, match="no place of their own"):
        Merge(replace(adapter, updates=renamed), spec, "nf4").write(tmp_path / "a")
    update = adapter.updates[Q_PROJ]
    wrong = replace(update, up_OK=update.up_OK[:-1])
    with pytest.raises(UserError, match="and \\(63, 64\\) in the adapter"):
        Merge(replace(adapter, updates={**adapter.updates, Q_PROJ: wrong}), spec, "original").write(tmp_path / "b")
    infinite = replace(update, up_OK=update.up_OK * float("inf"))
    with pytest.raises(UserError, match="not finite"):
        Merge(replace(adapter, updates={**adapter.updates, Q_PROJ: infinite}), spec, "original").write(tmp_path / "c")


def test_the_round_trip_is_what_training_saw(run: Path, backbone: Path) -> None:
    import bitsandbytes as bnb

    layer = open_run(run).model.get_base_model().get_submodule(Q_PROJ).get_base_layer()
    seen = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    stored = {name.removeprefix("model."): t for name, t in load_file(backbone / "model.safetensors").items()}
    weight = next(
        tensor
        for name, tensor in stored.items()
        if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name
    )
    rounded = weight.clone()
    nf4_round_trip(rounded, torch.float32)
    assert torch.equal(rounded, seen.view_as(weight)) and not torch.equal(rounded, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    monkeypatch.setattr(merge_module, "BLOCK", 2**12)
    weight = torch.randn(96, 200, dtype=dtype)  # the last block is a short one, in scales too
    packed = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        "cpu"
    )
    whole = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    nf4_round_trip(weight, dtype)
    assert torch.equal(weight, whole)


def test_a_wrong_merge_is_noticed_and_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge_module.add_update

    def wrong(weight: Tensor, update: Any) -> None:
        right(weight, replace(update, up_OK=update.up_OK * 1.02))  # as a scaling that was applied twice, a little

    monkeypatch.setattr(merge_module, "add_update", wrong)
    with pytest.raises(CheckError, match="does not compute what its adapter computes") as error:
        export(run, Request(tasks=("color",), forms=("merged",)), QUIET)
    assert error.value.exit_code == 1
    assert list((run / "exports").iterdir()) == []


def test_rounding_in_16_bits_is_allowed_and_a_missed_layer_is_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(str(run / "recipe.yaml"), ["model.dtype=bfloat16"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    for base in ("nf4", "original"):
        (made,) = export(run, Request(tasks=("color",), forms=("merged",), base=base), QUIET)  # type: ignore[arg-type]
        assert 1e-5 < made["logits_difference"] < 0.03
    right, calls = merge_module.add_update, []

    def forgetful(weight: Tensor, update: Any) -> None:
        calls.append(None)
        if len(calls) != 5:
            right(weight, update)

    monkeypatch.setattr(merge_module, "add_update", forgetful)
    with pytest.raises(CheckError):
        export(run, Request(tasks=("color",), forms=("merged",)), QUIET)
    assert len(calls) == 14


def test_a_crash_leaves_nothing_that_looks_finished(run: Path, tmp_path: Path) -> None:
    """Killed while it merges: no folder under an export's name, and the next export cleans up."""
    script = (
        "import sys, time, qmixlora.export.merge as m\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from qmixlora.export import Request, export\n"
        "m.add_update = lambda *_: (print('merging', flush=True), time.sleep(60))\n"
        "export(Path(sys.argv[1]), Request(tasks=('color',), forms=('merged',)), Console(quiet=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "merging"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in (run / "exports").iterdir()]
    assert left and all(name.startswith(".") for name in left)
    export(run, Request(tasks=("color",), forms=("merged",)), QUIET)
    assert [path.name for path in (run / "exports").iterdir()] == ["color-merged"]


def test_a_full_disk_while_merging(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "add_update", full)
    with pytest.raises(UserError, match="The disk is full"):
        export(run, Request(tasks=("color",), forms=("lora", "merged")), QUIET)
    assert [path.name for path in (run / "exports").iterdir()] == ["color-lora"]  # whole, and measured
    assert (run / "exports" / "color-lora" / "fidelity.json").is_file()


def test_task_routing_exports_exactly(make_run: Callable[..., Path]) -> None:
    folder = make_run("task", route_on="task")
    for made in export(folder, Request(tasks=TASKS), QUIET):
        assert made["update_error"]["mean"] < 1e-6 and made["agreement"]["lora"] == 1.0
        assert made["loss"]["lora"] == pytest.approx(made["loss"]["live"], abs=1e-5)


def test_the_update_error_is_that_of_dense_matrices(run: Path) -> None:
    live = open_run(run)
    state, rows = learned_by(live.model), rows_of(run, "color")
    _, updates = measure_live(live, state, rows)
    torch.manual_seed(0)
    adapter = state.adapter(torch.rand(14, 4, 4))
    layer = dict(live.model.named_modules())[f"base_model.model.{Q_PROJ}"]
    pools, dense = state.pools[Q_PROJ], []
    for row in rows:
        live.model(**on_device(live.collator([row]), torch.device("cpu")))
        mix_EF = live.model.base_model.mixlora_routing.current.mixes[layer, "default"][0]
        dense.append(state.scaling * pools[1].T @ mix_EF.T @ pools[0])
    target = adapter.updates[Q_PROJ].up_OK @ adapter.updates[Q_PROJ].down_KI
    error = sum((d - target).square().sum() for d in dense) / sum(d.square().sum() for d in dense)
    assert updates.errors(state, adapter)[Q_PROJ] == pytest.approx(float(error), rel=1e-4)


def test_tasks_are_mixed_by_their_matrices(run: Path) -> None:
    export(run, Request(tasks=TASKS), QUIET)
    (made,) = export(run, Request(tasks=("color=0.9", "count=0.3")), QUIET)
    assert made["tasks"] == {"color": pytest.approx(0.75), "count": pytest.approx(0.25)} and made["samples"] == 4
    one, two, both = (read(run / "exports" / f"{name}-lora").updates[Q_PROJ] for name in (*TASKS, "color+count"))
    torch.testing.assert_close(both.up_OK, 0.75 * one.up_OK + 0.25 * two.up_OK)
    assert torch.equal(both.down_KI, one.down_KI)
    (made,) = export(run, Request(together=True), QUIET)
    assert (run / "exports" / "all-lora").is_dir() and len(made["tasks"]) == 10


def test_a_smaller_rank(run: Path) -> None:
    (exact,) = export(run, Request(tasks=("color",)), QUIET)
    full = read(run / "exports" / "color-lora")
    (made,) = export(run, Request(tasks=("color",), rank=2), QUIET)
    cut = read(run / "exports" / "color-lora")
    assert (exact["rank"], made["rank"]) == (4, 2) and exact["kept"] == {}
    kept = made["kept"]["rank"]["layers"][Q_PROJ]
    left, values, right = torch.linalg.svd(full.updates[Q_PROJ].up_OK @ full.updates[Q_PROJ].down_KI)
    assert kept == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-4)
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(cut.updates[Q_PROJ].up_OK @ cut.updates[Q_PROJ].down_KI, best, atol=1e-4, rtol=0)


def test_polishing_learns_the_task_and_touches_the_factors_alone(run: Path) -> None:
    export(run, Request(tasks=("color",), polish=0), QUIET)
    before = read(run / "exports" / "color-lora")
    state, live = learned_by(open_run(run).model), open_run(run)
    rows = rows_of(run, "color", "train")
    put_on = lora_session(live, before, trained=set(state.pools))
    loss = measure(put_on, rows).loss
    polish(put_on, before, rows, 15, QUIET)
    after = taken_off(put_on.model)
    assert measure(put_on, rows).loss < 0.7 * loss
    assert not torch.equal(after.updates[Q_PROJ].up_OK, before.updates[Q_PROJ].up_OK)
    for name, value in before.modules.items():
        assert torch.equal(after.modules[name], value)


def test_polishing_starts_from_a_share_of_the_mean(run: Path) -> None:
    export(run, Request(tasks=("color",), polish=0), QUIET)
    mean, live = read(run / "exports" / "color-lora"), open_run(run)
    still = live.recipe.train.model_copy(update={"learning_rate": 1e-12})
    session = replace(live, recipe=live.recipe.model_copy(update={"train": still}))
    session = lora_session(session, mean, trained=mean.updates)
    polish(session, mean, rows_of(run, "color", "train"), 1, QUIET)
    for layer, update in taken_off(session.model).updates.items():
        torch.testing.assert_close(update.up_OK, START * mean.updates[layer].up_OK)
        torch.testing.assert_close(update.down_KI, mean.updates[layer].down_KI)


def test_the_recipe_polishes_what_lost_something_and_a_request_everything(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(make_run("task", route_on="task"), tmp_path / "run"))  # loses nothing
    recipe = load_recipe(str(folder / "recipe.yaml"), ["export.polish=3"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (made,) = export(folder, Request(tasks=("color",)), QUIET)
    assert made["polish_steps"] == 0
    (made,) = export(folder, Request(tasks=("color",), polish=2), QUIET)
    assert made["polish_steps"] == 2
    monkeypatch.setattr(exporter_module, "TOLERATED", 1e9)
    (made,) = export(folder, Request(tasks=("color",)), QUIET)
    assert made["polish_steps"] == 3


def test_a_plain_lora_run_exports_through_the_same_verb(make_run: Callable[..., Path]) -> None:
    folder = make_run("lora", method="lora", r=4)
    (made,) = export(folder, Request(tasks=("color",)), QUIET)
    assert made["update_error"]["mean"] < 1e-6 and made["agreement"]["lora"] == 1.0 and made["rank"] == 4
    rows = rows_of(folder, "color")
    expected = logits(open_run(folder), rows)
    torch.testing.assert_close(logits(open_run(folder / "exports" / "color-lora"), rows), expected, atol=1e-4, rtol=0)


def test_layers_without_an_adapter_went_through_nf4_too(make_run: Callable[..., Path]) -> None:
    """What a run has in NF4 and does not adapt is merged as it was trained on; without a projector there is no note."""
    folder = make_run("some layers", target_modules=["q_proj", "v_proj"], train_projector=False)
    lora, merged = export(folder, Request(tasks=("color",), forms=("lora", "merged")), QUIET)
    assert merged["logits_difference"] < 1e-4 and len(merged["update_error"]["layers"]) == 4
    assert lora["notes"] == []
    changed = load_file(folder / "exports" / "color-merged" / "model.safetensors")
    base = load_file(Path(load_recipe(str(folder / "recipe.yaml")).model.id) / "model.safetensors")
    different = {name for name, tensor in base.items() if not torch.equal(tensor, changed[name])}
    assert len(different) == 14 and not any("projector" in name for name in different)


def test_calibration_on_samples_that_the_run_never_saw(run: Path, data: Path, tmp_path: Path) -> None:
    export(run, Request(tasks=("color",)), QUIET)
    counted = read(run / "exports" / "color-lora").updates[Q_PROJ]
    export(run, Request(tasks=("color",), calibration=str(data / "test.json")), QUIET)
    calibrated = read(run / "exports" / "color-lora").updates[Q_PROJ]
    assert not torch.equal(counted.up_OK, calibrated.up_OK)
    _, updates = measure_live(open_run(run), state := learned_by(open_run(run).model), rows_of(run, "color"))
    expected = state.adapter(updates.mix_LEF).updates[Q_PROJ]
    torch.testing.assert_close(calibrated.up_OK, expected.up_OK)
    with pytest.raises(UserError, match="no sample of 'count'"):
        rows = [row for row in json.loads((data / "test.json").read_text()) if row["task"] == "color"]
        path = data / "only-color.json"
        path.write_text(json.dumps(rows))
        export(run, Request(tasks=TASKS, calibration=str(path)), QUIET)


def test_a_task_without_samples_in_the_record_is_calibrated_on_its_training_rows(run: Path) -> None:
    export(run, Request(tasks=("color",)), QUIET)
    counted = read(run / "exports" / "color-lora").updates[Q_PROJ]
    tensors = load_file(run / "routing.safetensors")
    with safe_open(run / "routing.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["count"][json.loads(metadata["tasks"]).index("color")] = 0
    tensors[f"{Q_PROJ}.mean"].zero_()
    save_file(tensors, run / "routing.safetensors", metadata)
    export(run, Request(tasks=("color",)), QUIET)
    again = read(run / "exports" / "color-lora").updates[Q_PROJ]
    assert again.up_OK.abs().sum() > 0 and not torch.equal(again.up_OK, counted.up_OK)


def test_names_and_mistakes() -> None:
    known = ["PlotQA+visual_question_answering", "a/b", "a b", "c=1", ".."]
    assert safe_name(known[0]) == known[0] and safe_name("../x y/é") == "__x_y__" and safe_name("") == "_"
    plans = make_targets(Request(tasks=("c=1", "a/b")), known)
    assert [(plan.name, plan.shares) for plan in plans] == [("c_1", {"c=1": 1.0}), ("a_b", {"a/b": 1.0})]
    (plan,) = make_targets(Request(tasks=("c=1=3", "a/b")), known)
    assert plan.shares == {"c=1": 0.75, "a/b": 0.25}
    for tasks, words in {
        ("d",): "no task 'd'",
        ("a/b=x",): "'x' is no weight",
        ("a/b=0",): "'0' is no weight",
        ("a/b", "a b"): "Several tasks would be written to a_b",
    }.items():
        with pytest.raises(UserError, match=words):
            make_targets(Request(tasks=tasks), known)


MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from qmixlora.export.low_rank import LowRank
from qmixlora.export.merge import Merge
from qmixlora.export.static import StaticAdapter, learned, lora_session, put, read, taken_off
from qmixlora.recipe import Model
import qmixlora.session
from qmixlora.export.merge import nf4_round_trip
folder, out, base = sys.argv[1:4]
O, I, layers = 8192, 14336, 3
updates = {
    f"model.language_model.layers.{n}.mlp.down_proj": LowRank(torch.randn(16, I) * 0.01, torch.randn(O, 16) * 0.01)
    for n in range(layers)
}
nf4_round_trip(torch.randn(256, 256).bfloat16(), torch.bfloat16)
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
Merge(StaticAdapter(updates, {}), Model(id=folder), base).write(Path(out))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"idle": idle, "peak": peak, "largest": O * I * 2 / 2**20}))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, processor: Any) -> None:
    """Merging a checkpoint of 2.1 GB in one shard stays under twice its largest tensor plus 400 MiB: into NF4, which
    takes all that the original weights take and the round trip.
    """
    source = big_checkpoint(tmp_path / "big", processor)
    size = (source / "model.safetensors").stat().st_size
    assert size > 2e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "merged"), "nf4"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size == size
    assert found["peak"] - found["idle"] < 2 * found["largest"] + 400, found
    shutil.rmtree(tmp_path / "big")
    shutil.rmtree(tmp_path / "merged")


def big_checkpoint(folder: Path, processor: Any) -> Path:
    """A LLaVA with three wide layers (zeros, written without ever being in memory)."""
    from transformers import LlavaForConditionalGeneration

    from qmixlora.demo.backbone import make_config

    config = make_config(processor.tokenizer, layers=3, width=64)
    config.text_config.hidden_size, config.text_config.intermediate_size = 8192, 14336
    config.text_config.head_dim, config.text_config.num_attention_heads, config.text_config.num_key_value_heads = (
        64,
        1,
        1,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    described: dict[str, Any] = {}
    offset = 0
    for name, tensor in state.items():
        length = tensor.numel() * 2
        described[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    header = json.dumps(described).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return folder


def test_a_plain_lora_is_polished_from_all_of_its_update(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    monkeypatch.setattr(exporter_module, "polish", lambda *arguments, start: starts.append(start))
    for name, adapter in (("lora", {"method": "lora", "r": 4}), ("embedding", {})):
        export(make_run(name, **adapter), Request(tasks=("color",), polish=1), QUIET)
    assert starts == [1.0, START]
