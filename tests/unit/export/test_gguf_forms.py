"""`--as gguf` and `--as live-gguf`: what is written, what a server of llama.cpp makes of it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from qmixlora.data import question_about
from qmixlora.errors import CheckError, UserError
from qmixlora.export import Request, export, live_gguf
from qmixlora.export.forms import MAKERS
from qmixlora.export.static import read
from qmixlora.export.targets import Form
from qmixlora.manifest import first_change
from qmixlora.mixlora import routed_as
from qmixlora.serving.fingerprint import read_fingerprint
from qmixlora.serving.route import scales
from qmixlora.session import Session, open_run

from .gguf_files import NODE, asked_llama_cpp, facts_of, tensors_of, write_base
from .helpers import QUIET, edit_recipe, exported

pytest.importorskip("gguf", reason="the extra gguf is not installed")
MODEL_ROUTER = {"router": "model", "num_factors": 6, "r": 3}
QUESTIONS = ("What colour is it?", "How many are there?", "Say what you read.", "  Is it large ?\n", "Which shape")
through_the_binding = pytest.mark.skipif(
    not NODE.is_dir() or shutil.which("node") is None, reason="node-llama-cpp is not installed (NODE_LLAMA_CPP)"
)


@pytest.fixture(scope="module")
def routed(train_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, qmixlora: Any) -> Path:
    """A run with one router, exported as a live mixture and as the files of a task, with what was said of it."""
    run = Path(shutil.copytree(train_once(**MODEL_ROUTER), tmp_path_factory.mktemp("routed") / "run"))
    forms = [word for form in ("lora", "gguf", "live-gguf") for word in ("--as", form)]
    done = qmixlora("export", run, "--task", "color", "--samples", "2", *forms)
    assert done.code == 0, done.stderr
    (run / "said").write_text(done.stdout)
    return run


def answer(session: Session, question: str, count: int) -> tuple[list[int], list[int], list[float]]:
    """(prompt, the likeliest tokens after it, their log-probabilities) of a model, whatever ends an answer."""
    inputs, routing = session.collator.routed_prompts([question_about([], question)])
    ids_1S, logprobs = inputs["input_ids"], []
    with torch.inference_mode(), session.evaluating(), routed_as(session.model, **routing):
        for _ in range(count):
            values_V = session.model(input_ids=ids_1S, use_cache=False).logits[0, -1].log_softmax(dim=-1)
            logprobs.append(float(values_V.max()))
            ids_1S = torch.cat([ids_1S, values_V.argmax()[None, None]], dim=1)
    ids = ids_1S[0].tolist()
    return ids[:-count], ids[-count:], logprobs


def test_the_table_has_a_maker_of_every_form() -> None:
    from qmixlora.cli.export import Form as Words

    assert set(MAKERS) == set(get_args(Form)) == {word.value for word in Words}
    assert all((maker.of_adapters is None) != (maker.of_run is None) for maker in MAKERS.values())


@pytest.mark.long
def test_the_table_of_an_export_has_a_column_for_each_form_of_a_task(routed: Path) -> None:
    said = (routed / "said").read_text()
    assert "live    lora    gguf" in said and said.count("\n  color") == 1
    assert "from the run's own, at most, on 16 held-out instructions" in said


def test_files_of_tasks_need_tasks_and_the_live_mixture_none(run: Path, qmixlora: Any) -> None:
    done = qmixlora("export", run, "--as", "gguf", "--as", "live-gguf")
    assert done.code == 2 and "Say which tasks" in done.stderr
    assert "a router of every layer" in qmixlora("export", run, "--as", "live-gguf").stderr


@pytest.mark.long
def test_a_check_of_a_lora_file_wants_its_server(routed: Path, qmixlora: Any) -> None:
    done = qmixlora("check", routed / "exports" / "color-gguf")
    assert done.code == 2 and "--llama-server" in done.stderr


def test_a_lora_file_has_the_adapter_and_its_facts(routed: Path) -> None:
    folder = routed / "exports" / "color-gguf"
    facts, tensors = facts_of(folder / "color.gguf"), tensors_of(folder / "color.gguf")
    adapter = read(routed / "exports" / "color-lora")
    assert facts["adapter.lora.task_name"] == "color" and facts["adapter.lora.alpha"] == 6.0
    assert {len(array) for name, array in tensors.items() if name.endswith("lora_a")} == {6}
    down = adapter.updates["model.language_model.layers.1.mlp.down_proj"].down_KI
    assert torch.equal(torch.tensor(tensors["blk.1.ffn_down.weight.lora_a"]), down)
    own, lora = (json.loads((routed / "exports" / f"color-{form}" / "fidelity.json").read_text()) for form in FORMS)
    assert own["form"] == "gguf" and own["exact_match"]["gguf"] == lora["exact_match"]["lora"]
    assert "makes no file for images of llava with clip_vision_model" in own["notes"][0]
    assert (folder / "base.json").read_bytes() == (routed / "exports" / "base" / "base.json").read_bytes()
    assert first_change(folder) is None


FORMS = ("gguf", "lora")


def test_a_lora_file_has_its_loras_fingerprint(routed: Path) -> None:
    own, lora = (read_fingerprint(routed / "exports" / f"color-{form}") for form in FORMS)
    assert (own.name, own.form, own.prompts) == ("color", "gguf", lora.prompts)


def test_a_lora_file_alone_leaves_no_lora_behind(make_run: Callable[..., Path]) -> None:
    run = make_run()
    exported(run, forms=("gguf",), rank=2)
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["base", "color-gguf"]
    facts = facts_of(run / "exports" / "color-gguf" / "color.gguf")
    assert facts["adapter.lora.alpha"] == 2.0


def test_the_client_gives_the_scales_of_the_live_model(routed: Path, data: Path) -> None:
    session, folder = open_run(routed), routed / "exports" / "live"
    for question in QUESTIONS:
        answer(session, question, 1)
        own_E = session.model.base_model.last_selection()[0, 0].diagonal()  # type: ignore[operator,union-attr]
        found = {one["id"]: one["scale"] for one in scales(folder, question)}
        assert len(found) == 3 and own_E.tolist() == pytest.approx([found.get(i, 0.0) for i in range(6)], abs=1e-5)


def test_the_client_runs_without_torch_and_without_qmixlora(routed: Path, qmixlora: Any) -> None:
    folder = routed / "exports" / "live"
    script = f"import runpy, sys; sys.argv = ['route.py', {QUESTIONS[0]!r}, '--image']\n"
    script += f"runpy.run_path({str(folder / 'route.py')!r}, run_name='__main__')\n"
    script += "assert not {'torch', 'transformers', 'qmixlora'} & {name.split('.')[0] for name in sys.modules}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    printed = qmixlora("route", routed, QUESTIONS[0], "--image").stdout
    assert json.loads(done.stdout) == json.loads(printed) and len(json.loads(printed)["lora"]) == 3


def test_factors_at_their_gates_are_the_live_update(routed: Path) -> None:
    """Of one layer, by hand: the files' rank-one updates, at alpha and scale as llama.cpp applies them."""
    session, folder = open_run(routed), routed / "exports" / "live"
    layer = "model.language_model.layers.0.mlp.up_proj"
    module, total = session.model.get_submodule(f"base_model.model.{layer}"), 0.0
    for one in scales(folder, QUESTIONS[0]):
        file = folder / f"factor-{one['id']}.gguf"
        a, b = (torch.tensor(tensors_of(file)[f"blk.0.ffn_up.weight.lora_{half}"]) for half in "ab")
        total = total + one["scale"] * facts_of(file)["adapter.lora.alpha"] * b @ a
    answer(session, QUESTIONS[0], 1)
    mix_EF = session.model.base_model.last_selection()[0, 0]  # type: ignore[operator,union-attr]
    pools = (getattr(module, f"mixlora_{pool}")["default"] for pool in "AB")
    pool_EI, pool_EO = pools
    live_OI = 4 / 3 * pool_EO.T @ mix_EF.T @ pool_EI
    torch.testing.assert_close(total, live_OI, atol=1e-5, rtol=1e-4)


def test_a_router_that_went_wrong_is_noticed(routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(routed, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    monkeypatch.setattr(live_gguf.LlamaModel, "write_lora", lambda *_, **__: None)
    monkeypatch.setattr("qmixlora.export.router.INSTRUCTION", "s")  # not what stands in the template alone
    with pytest.raises(CheckError, match="gives other scales than the run"):
        export(run, Request(forms=("live-gguf",)), QUIET)
    assert not (run / "exports" / "live").exists()


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({}, "a router of every layer", "adapter.router=model"),
        ({"method": "lora"}, "a plain LoRA", "adapter.router=model"),
        ({"router": "model", "route_on": "task"}, "routed on tasks", "--as gguf"),
    ],
)
def test_other_runs_are_no_live_mixture(changes: dict[str, Any], message: str, fix: str, run: Path) -> None:
    edit_recipe(run, **{f"adapter__{name}": value for name, value in changes.items()})
    (run / "adapter" / "adapter_model.safetensors").unlink()  # it is refused before anything is loaded
    with pytest.raises(UserError, match=message) as error:
        export(run, Request(forms=("live-gguf",)), QUIET)
    assert fix in (error.value.fix or "")


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_projector_in_the_adapter_is_refused_for_llama_cpp(trained: str, run: Path) -> None:
    edit_recipe(run, adapter__projector=trained)
    with pytest.raises(UserError, match="of the language model alone") as error:
        exported(run, forms=("gguf",), projector="low-rank")
    assert "Leave --projector out" in (error.value.fix or "")


def test_a_run_without_a_router_to_ask_says_what_to_do(run: Path, qmixlora: Any) -> None:
    done = qmixlora("route", run, "a question")
    assert done.code == 2 and "--as live-gguf" in done.stderr


def opened_as_served(folder: Path, scratch: Path) -> Session:
    """A run or an export on the weights that a server has."""
    copy = Path(shutil.copytree(folder, scratch / folder.name, ignore=shutil.ignore_patterns("exports", "base.json")))
    edit_recipe(copy, model__quantization="none")
    return open_run(copy)


@through_the_binding
def test_llama_cpp_answers_as_the_lora_and_as_the_live_mixture(routed: Path, tmp_path: Path) -> None:
    exports = routed / "exports"
    base = write_base(exports / "base", tmp_path / "base.gguf")
    jobs, expected = [], []
    lora, live = (opened_as_served(folder, tmp_path) for folder in (exports / "color-lora", routed))
    for question in QUESTIONS:
        gates = scales(exports / "live", question)
        files = [{"filePath": str(exports / "live" / f"factor-{g['id']}.gguf"), "scale": g["scale"]} for g in gates]
        static = [{"filePath": str(exports / "color-gguf" / "color.gguf"), "scale": 1.0}]
        for session, adapters in ((live, files), (lora, static)):
            prompt, tokens, logprobs = answer(session, question, 12)
            jobs.append({"prompt": prompt, "adapters": adapters, "count": 12})
            expected.append((tokens, logprobs))
    jobs.append({**jobs[0], "adapters": []})
    *answers, plain = asked_llama_cpp(base, jobs)
    for given, (tokens, logprobs) in zip(answers, expected, strict=True):
        assert given["tokens"] == tokens and given["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    assert plain["logprobs"] != pytest.approx(expected[0][1], abs=0.01)
