"""The check of an export: what it says of servers that apply it, and of those that do something else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qmixlora.bases import own_base
from qmixlora.errors import CheckError, UserError
from qmixlora.manifest import first_change
from qmixlora.serving.check import Report, check
from qmixlora.serving.comparison import Difference, difference
from qmixlora.serving.fingerprint import FINGERPRINT, Answer, Fingerprint, Message, Step, has_image, read_fingerprint
from qmixlora.serving.local import with_peft, with_transformers
from qmixlora.serving.making import fingerprint_adapter
from qmixlora.serving.servers import llama_server, openai_server
from tests.conftest import CommandLine


def by_peft(adapter: Path, base: Path | None = None) -> Report:
    fingerprint = read_fingerprint(adapter)
    return check(fingerprint, with_peft(adapter, fingerprint, None if base is None else str(base)))


def by_transformers(folder: Path) -> Report:
    fingerprint = read_fingerprint(folder)
    return check(fingerprint, with_transformers(folder, fingerprint))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def scale_tensors(path: Path, factor: float, of: str) -> None:
    tensors = load_file(path)
    assert any(of in name for name in tensors)
    save_file({n: factor * t if of in n else t for n, t in tensors.items()}, path, {"format": "pt"})


def original_of(exports: Path) -> str:
    return str(json.loads((exports / "base" / "base.json").read_text())["model"])


def test_every_export_has_a_fingerprint_and_is_applied_by_stock_libraries(made_exports: Path) -> None:
    for report in (
        by_peft(made_exports / "a-lora"),
        by_transformers(made_exports / "a-merged"),
        by_transformers(made_exports / "base"),
    ):
        assert report.verdict == "applied" and report.found["export"].mean < 1e-4 and report.notes == ()
        assert report.found["base"].mean > 0.05
    for form in ("a-lora", "a-merged", "base"):
        assert FINGERPRINT in json.loads((made_exports / form / "manifest.json").read_text())["files"]
        assert first_change(made_exports / form) is None


def test_a_fingerprint_holds_its_images_and_asks_without_one_and_of_a_large_one(made_exports: Path) -> None:
    prompts = read_fingerprint(made_exports / "a-lora").prompts
    assert {prompt.has_image for prompt in prompts} == {True, False}
    urls = [p["image_url"]["url"] for q in prompts for m in q.messages for p in m["content"] if p["type"] != "text"]
    assert all(url.startswith("data:image/png;base64,") for url in urls) and len(urls) == len(prompts) - 1
    assert set(prompts[0].answers) == {"export", "base", "original", "without_projector"}
    assert (made_exports / "a-lora" / FINGERPRINT).stat().st_size < 1e6


def test_an_adapter_that_was_dropped_answers_as_the_base(exports: Path) -> None:
    scale_tensors(exports / "a-lora" / "adapter_model.safetensors", 0.0, of="lora_B")
    report = by_peft(exports / "a-lora")
    assert (report.verdict, report.reasons) == ("not applied", ("It answers as the base without it.",))


def test_an_adapter_on_the_model_before_training_lacks_its_projector(exports: Path) -> None:
    report = by_peft(exports / "a-lora", base=Path(original_of(exports)))
    assert report.verdict == "something else"
    limited = by_peft(exports / "a-lora", base=with_settings_of(exports))
    assert limited.verdict == "something else"
    assert limited.reasons == ("It answers as the export without its projector.",)


def with_settings_of(exports: Path) -> Path:
    """The original model behind the processor of the run's base, as where the projector alone is dropped."""
    folder = Path(shutil.copytree(exports / "base", exports.parent / "dropped"))
    shutil.copyfile(Path(original_of(exports)) / "model.safetensors", folder / "model.safetensors")
    return folder


def test_a_server_that_is_further_off_than_rounding_is_told_whose_answers_it_has(exports: Path) -> None:
    scale_tensors(exports / "a-lora" / "adapter_model.safetensors", 0.03, of="lora_B")
    report = by_peft(exports / "a-lora")
    assert report.tolerance < report.found["base"].mean < report.found["export"].mean / 10
    assert report.verdict == "something else" and report.reasons == ("It answers most like the base without it.",)


@pytest.mark.parametrize("alpha", [2, 16])
def test_another_alpha_is_something_else_on_the_right_base(exports: Path, alpha: int) -> None:
    edit(exports / "a-lora" / "adapter_config.json", lora_alpha=alpha)
    report = by_peft(exports / "a-lora")
    assert report.verdict == "something else" and "another scale (alpha)" in report.reasons[0]
    assert report.found["export"].mean > report.tolerance


def test_another_base_is_told_from_another_scale(exports: Path) -> None:
    scale_tensors(exports / "base" / "model.safetensors", 1.3, of="down_proj")
    report = by_peft(exports / "a-lora")
    assert report.verdict == "something else" and "base below the adapter is another one" in report.reasons[0]


@dataclass(frozen=True)
class Shifted:
    """A server whose log-probabilities are off by so much: without an image, with one, and its base's."""

    fingerprint: Fingerprint
    plain: float
    seen: float
    base: float
    sees: bool = True

    def answer(self, messages: list[Message], max_tokens: int) -> Answer:
        return self._shifted(messages, "export", self.seen if has_image(messages) else self.plain)

    def answer_of_base(self, messages: list[Message], max_tokens: int) -> Answer:
        return self._shifted(messages, "base", self.base)

    def _shifted(self, messages: list[Message], whose: str, by: float) -> Answer:
        answer = next(p.answers[whose] for p in self.fingerprint.prompts if p.messages == messages)
        return replace(answer, steps=tuple(replace(one, logprob=(one.logprob or 0.0) - by) for one in answer.steps))


@pytest.mark.parametrize(
    ("plain", "seen", "base", "said"),
    [
        (1e-4, 0.05, 1e-4, "Without an image it answers as the export"),
        (0.009, 0.05, 0.02, "Without an image it answers as the export"),
        (0.009, 0.012, 0.02, "The base below the adapter is another one"),
        (0.009, 0.012, 0.009, "in fewer bits"),
        (0.05, 0.05, 0.009, "at another scale"),
    ],
)
def test_what_is_just_over_what_rounding_explains_is_not_blamed_on_images_or_a_scale(
    exports: Path, plain: float, seen: float, base: float, said: str
) -> None:
    fingerprint = read_fingerprint(exports / "a-lora")
    report = check(fingerprint, Shifted(fingerprint, plain, seen, base))
    assert report.verdict == "something else" and len(report.reasons) == 1 and said in report.reasons[0]


def test_images_of_another_size_are_told(exports: Path) -> None:
    shutil.copyfile(Path(original_of(exports)) / "processor_config.json", exports / "base" / "processor_config.json")
    report = by_peft(exports / "a-lora")
    assert report.verdict == "something else" and report.reasons[0].startswith("Images of another size:")


def test_another_chat_template_is_told(exports: Path) -> None:
    template = exports / "base" / "chat_template.jinja"
    template.write_text("say this : " + template.read_text())
    report = by_peft(exports / "a-lora")
    assert report.verdict == "something else" and report.reasons[0].startswith("Another chat template or tokenizer:")


def test_a_merged_checkpoint_of_the_base_alone_is_not_applied(exports: Path) -> None:
    merged = exports / "a-merged"
    shutil.copyfile(Path(original_of(exports)) / "model.safetensors", merged / "model.safetensors")
    assert by_transformers(merged).verdict == "not applied"


@pytest.mark.long
def test_a_server_that_applies_an_adapter_is_told_from_those_that_do_not(
    qmixlora: CommandLine, made_exports: Path, server: str
) -> None:
    lora = made_exports / "a-lora"
    done = qmixlora("check", lora, "--url", server, "--json")
    report = json.loads(done.stdout)
    assert (done.code, report["verdict"]) == (0, "applied"), done.stdout + done.stderr
    assert report["against"]["export"]["same"] == report["prompts"]
    done = qmixlora("check", lora, "--url", f"{server}/v1", "--name", "base")
    assert done.code == 1 and "not applied" in done.stdout, done.stdout + done.stderr
    done = qmixlora("check", lora, "--url", server, "--name", "doubled")
    assert done.code == 1 and "another scale (alpha)" in done.stdout
    done = qmixlora("check", lora, "--url", server, "--name", "other")
    assert done.code == 2 and "it has base, a, doubled" in done.stderr


def test_llama_server_is_asked_by_the_scales_of_its_adapters(made_exports: Path, server: str) -> None:
    """Without eyes, as it is for most models: prompts without an image alone."""
    fingerprint = read_fingerprint(made_exports / "a-lora")
    report = check(fingerprint, llama_server(server, fingerprint, "", None))
    assert report.verdict == "applied" and any("takes no images" in note for note in report.notes)
    doubled = check(fingerprint, llama_server(server, fingerprint, "", "doubled"))
    assert doubled.verdict == "something else" and "another scale" in doubled.reasons[0]
    with pytest.raises(UserError, match="Which adapter is 'b'"):
        llama_server(server, fingerprint, "", "b")


def test_a_character_of_several_tokens_is_compared_though_llama_server_tells_its_last_one_alone() -> None:
    """It tells tokens by id and text, and leaves out those that end within a character (llama.cpp of 0.3.36)."""
    whole = [Step(1, "a", -0.5), Step(2, "\ufffd", -0.4), Step(3, "\ufffd", -0.3), Step(4, "b", -0.2)]
    smile = Step(3, "\U0001f642", -0.3)

    def compared(*observed: Step, expected: tuple[Step, ...] = tuple(whole)) -> Difference:
        return difference([Answer(observed, "", None)], [Answer(expected, "", None)])

    told = compared(whole[0], smile, whole[3])
    assert (told.same, told.logprobs) == (1, (0.0, 0.0, 0.0))
    assert compared(whole[0], expected=tuple(whole[:2])).same == 1, "the answer was cut within a character"
    assert compared(whole[0], smile, Step(5, "c", -0.2)).same == 0
    assert compared(whole[0], whole[3]).same == 0, "the character is missing"
    by_ids = [replace(step, text="") for step in (whole[0], whole[2], whole[3])]
    assert compared(*by_ids).same == 0, "vLLM tells every token"


def test_sglang_is_asked_so_that_the_adapter_answers(made_exports: Path, server: str) -> None:
    """By the adapter's name alone SGLang answers as the base (0.5.23: `_resolve_lora_path`)."""
    fingerprint = read_fingerprint(made_exports / "a-lora")
    asked = openai_server(f"{server}/sglang", fingerprint, "", None)
    assert asked.model == "base:a" and check(fingerprint, asked).verdict == "applied"
    assert check(fingerprint, replace(asked, model="a")).verdict == "not applied"
    assert check(fingerprint, openai_server(f"{server}/sglang", fingerprint, "", "doubled")).verdict == "something else"


def test_a_server_that_refuses_or_is_not_there_is_told(qmixlora: CommandLine, made_exports: Path, server: str) -> None:
    fingerprint = read_fingerprint(made_exports / "a-lora")
    asked = replace(openai_server(server, fingerprint, "", None), model="nobody")
    with pytest.raises(CheckError, match="The model nobody does not exist"):
        check(fingerprint, asked)
    done = qmixlora("check", made_exports / "a-lora", "--url", "http://127.0.0.1:9")
    assert done.code == 2 and "No server answers" in done.stderr


def test_an_adapter_of_another_tool_gets_a_fingerprint(qmixlora: CommandLine, exports: Path) -> None:
    adapter, base = exports / "a-lora", exports / "base"
    for name in (FINGERPRINT, "base.json"):
        (adapter / name).unlink()
    assert own_base(adapter) is None
    assert qmixlora("check", adapter).code == 2
    assert qmixlora("check", "--adapter", adapter).code == 2
    done = qmixlora("check", "--adapter", adapter, "--base", base, "--dtype", "float32", "--peft")
    assert done.code == 0 and "applied" in done.stdout and (adapter / FINGERPRINT).is_file(), done.stderr
    again = qmixlora("check", "--adapter", adapter, "--base", base)
    assert again.code == 2 and "has a fingerprint" in again.stderr and f"qmixlora check {adapter}" in again.stderr
    edit(adapter / "adapter_config.json", lora_alpha=0)
    assert by_peft(adapter).verdict == "not applied"
    with pytest.raises(UserError, match="does not load on this base"):
        fingerprint_adapter(adapter, str(exports / "a-lora"), "float32")


def test_an_adapter_that_does_nothing_on_a_base_gets_no_fingerprint(exports: Path) -> None:
    """As one for another model: PEFT leaves out what it has no place for."""
    weights = exports / "a-lora" / "adapter_model.safetensors"
    renamed = {name.replace("language_model", "other"): one for name, one in load_file(weights).items()}
    save_file(renamed, weights, {"format": "pt"})
    with pytest.raises(UserError, match="answers as without it"):
        fingerprint_adapter(exports / "a-lora", str(exports / "base"), "float32")


def test_each_form_is_asked_by_its_own_library(qmixlora: CommandLine, made_exports: Path) -> None:
    for form, option in (("a-lora", "--transformers"), ("a-merged", "--peft")):
        done = qmixlora("check", made_exports / form, option)
        assert done.code == 2 and "An adapter is asked by --peft" in done.stderr
    assert qmixlora("check", made_exports / "a-lora", "--adapter", made_exports / "a-lora").code == 2


def test_asking_a_server_needs_no_torch() -> None:
    script = (
        "import sys, qmixlora.serving.check, qmixlora.serving.servers, qmixlora.serving.fingerprint\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
