"""Files for servers: their commands name every adapter with limits that fit, and the client really asks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qmixlora.errors import UserError
from qmixlora.serving.files.exports import read_exports
from tests.conftest import CommandLine

from .written import edit, gguf_of, on_the_model_as_it_is, option, words_given, written


def test_vllm_is_started_with_every_adapter_by_name_and_limits_that_fit(exports: Path) -> None:
    shutil.copytree(exports / "a-lora", exports / "zähl mich-lora")
    edit(exports / "zähl mich-lora" / "adapter_config.json", rank_pattern={"layers.0.q_proj": 17})
    script = written(exports, "vllm") / "start.sh"
    words = words_given(script, "vllm", "--port", "8123")
    assert words[:2] == ["serve", "base"] and (exports / "base" / "config.json").is_file()
    at = {word: index for index, word in enumerate(words) if word.startswith("--")}
    assert words[at["--max-lora-rank"] + 1] == "32" and words[at["--dtype"] + 1] == "float32"
    adapters = [json.loads(word) for word in words[at["--lora-modules"] + 1 :][:2]]
    assert adapters == [{"name": name, "path": f"{name}-lora"} for name in ("a", "zähl mich")]
    assert words[at["--max-loras"] + 1] == words[at["--max-cpu-loras"] + 1] == "2"
    assert words[-2:] == ["--port", "8123"], "options of one's own come last, and win"


def test_more_adapters_than_a_batch_holds_still_have_a_place_on_the_host(exports: Path) -> None:
    for number in range(9):
        shutil.copytree(exports / "a-lora", exports / f"n{number}-lora")
    words = words_given(written(exports, "vllm") / "start.sh", "vllm")
    assert words[words.index("--max-loras") + 1] == "8" and words[words.index("--max-cpu-loras") + 1] == "10"


def test_the_compose_file_starts_the_same_script_where_it_mounts_it(exports: Path) -> None:
    folder = written(exports, "vllm")
    (service,) = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    source, target, _ = service["volumes"][0].split(":")
    script = Path(service["entrypoint"][1])
    assert (folder / source / script.relative_to(target)).samefile(folder / "start.sh")
    assert service["ports"] == ["127.0.0.1:8000:8000"] and service["entrypoint"][2:] == ["--host", "0.0.0.0"]


def test_the_client_asks_the_task_that_it_is_told(made_exports: Path, exports: Path, server: str) -> None:
    folder = written(exports, "vllm")
    edit(folder / "tasks.json", url=server)
    prompt = json.loads((exports / "a-lora" / "fingerprint.json").read_text())["prompts"][-2]
    (words,) = (part["text"] for part in prompt["messages"][0]["content"] if part["type"] == "text")
    assert f"python ask.py a '{words}'" in (folder / "README.md").read_text()
    command = [sys.executable, "-I", str(folder / "ask.py"), "a", words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and prompt["answers"]["export"]["text"] in done.stdout, done.stderr
    image = next(made_exports.parents[1].glob("*.png"))
    seeing = subprocess.run([*command, str(image)], capture_output=True, text=True, check=False)
    assert seeing.returncode == 0 and seeing.stdout != done.stdout, seeing.stderr
    unknown = subprocess.run([*command[:3], "b", words], capture_output=True, text=True, check=False)
    assert unknown.returncode == 1 and "Tasks: a" in unknown.stderr


def test_an_adapter_on_the_model_as_it_is_carries_its_stops_and_arguments_into_requests(exports: Path) -> None:
    lora = on_the_model_as_it_is(exports / "a-lora")
    (lora / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    edit(lora / "fingerprint.json", template_arguments={"enable_thinking": False})
    folder = written(exports, "vllm")
    assert words_given(folder / "start.sh", "vllm")[:2] == ["serve", "some/model"]
    request = json.loads((folder / "tasks.json").read_text())["tasks"]["a"]
    assert request == {"model": "a", "stop_token_ids": [7, 9], "chat_template_kwargs": {"enable_thinking": False}}
    (service,) = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    assert service["volumes"][1].startswith("${HF_HOME:-")


def test_sglang_is_asked_by_base_and_adapter_since_the_adapters_name_alone_is_the_base_there(exports: Path) -> None:
    folder = written(exports, "sglang")
    assert json.loads((folder / "tasks.json").read_text())["tasks"]["a"]["model"] == "base:a"
    words = words_given(folder / "start.sh", "python3")
    adapter = json.loads(option(words, "--lora-paths"))
    assert adapter == {"lora_name": "a", "lora_path": "a-lora"} and words[words.index("--max-lora-rank") + 1] == "4"


def test_llama_server_loads_all_adapters_at_scale_zero_and_is_asked_by_scales(exports: Path) -> None:
    gguf_of(exports)
    shutil.copytree(exports / "a-gguf", exports / "b-gguf")
    folder = written(exports, "llama-server")
    words = words_given(folder / "start.sh", "llama-server")
    assert words[words.index("--lora-scaled") + 1] == "a-gguf/a.gguf:0,b-gguf/a.gguf:0" and "--lora" not in words
    assert "--mmproj" not in words and "--no-cache-prompt" in words
    (folder / "mmproj.gguf").touch()
    folder = written(exports, "llama-server")
    words = words_given(folder / "start.sh", "llama-server")
    assert (exports / words[words.index("--mmproj") + 1]).is_file(), "a converted base stays"
    limits = [words[words.index(f"--image-{which}-tokens") + 1] for which in ("min", "max")]
    assert words[words.index("--parallel") + 1] == "1", "images of two adapters at once are mixed up"
    assert limits == ["1", "4"], "of the base's processor: the run holds images to four tokens"
    asked = json.loads((folder / "tasks.json").read_text())["tasks"]["b"]["lora"]
    assert asked == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    script = (folder / "convert.sh").read_text()
    assert "\nbase=base " in script and '"$base" --outtype f32 --outfile serve-llama-server/base.gguf' in script


def test_ollama_has_a_modelfile_for_each_task_that_names_files_that_are_there(exports: Path) -> None:
    gguf_of(exports)
    folder = written(exports, "ollama")
    assert words_given(folder / "start.sh", "ollama") == ["create", "a", "-f", "serve-ollama/a.Modelfile"]
    lines = (folder / "a.Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./base.gguf" and (folder / lines[1].removeprefix("ADAPTER ")).is_file()
    readme = (folder / "README.md").read_text()
    assert "--name a:latest" in readme and "While it runs, tell it of the tasks" in readme
    assert not (folder / "compose.yaml").exists()


def test_adapters_that_a_server_takes_in_part_are_refused_by_name(qmixlora: CommandLine, exports: Path) -> None:
    edit(exports / "a-lora" / "adapter_config.json", modules_to_save=["linear_1"])
    done = qmixlora("serve-files", exports, "--for", "vllm")
    assert done.code == 2 and "vLLM does not take" in done.stderr and "where: a-lora" in done.stderr
    edit(exports / "a-lora" / "adapter_config.json", modules_to_save=None)
    edit(exports / "a-lora" / "fidelity.json", projector="low-rank")
    done = qmixlora("serve-files", exports, "--for", "sglang")
    assert done.code == 2 and "low-rank factors" in done.stderr and "--projector base" in done.stderr
    assert not (exports / "serve-sglang").exists()


def test_what_no_server_can_be_told_of_is_refused(exports: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama-server is told of adapters") as refused:
        written(exports, "llama-server")
    assert "--as gguf" in refused.value.fix
    edit(exports / "a-lora" / "adapter_config.json", r=600)
    with pytest.raises(UserError, match="ranks up to 512"):
        written(exports, "vllm")
    shutil.copytree(exports / "a-lora", exports / "b-lora")
    (exports / "b-lora" / "base.json").unlink()
    edit(exports / "b-lora" / "adapter_config.json", base_model_name_or_path="other/model")
    with pytest.raises(UserError, match="one base") as several:
        written(exports, "vllm")
    assert "b on other/model" in several.value.where
    with pytest.raises(UserError, match="no exports"):
        read_exports(tmp_path / "exports" / "base")


def test_an_export_that_a_server_does_not_take_is_not_in_its_way(exports: Path) -> None:
    """Such as a LoRA that lies on an earlier base, for llama-server."""
    gguf_of(exports)
    edit(exports / "a-lora" / "base.json", projector="of an earlier run")
    assert (written(exports, "llama-server") / "start.sh").is_file()
    with pytest.raises(UserError, match="lies on another base"):
        written(exports, "vllm")


def test_the_verb_takes_a_runs_folder_and_says_where_it_wrote(qmixlora: CommandLine, exports: Path) -> None:
    done = qmixlora("serve-files", exports.parent, "--for", "vllm")
    assert done.code == 0 and f"sh {exports / 'serve-vllm' / 'start.sh'}" in done.stdout, done.stderr
    assert "a-merged" in (exports / "serve-vllm" / "README.md").read_text()
