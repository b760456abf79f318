"""Files for servers say what the adapters lie on, as the run had it, and call every adapter by a name that works."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qmixlora import files
from qmixlora.errors import UserError

from .written import edit, gguf_of, on_the_model_as_it_is, option, words_given, written


@pytest.mark.parametrize(("server", "program"), [("vllm", "vllm"), ("sglang", "python3")])
def test_a_server_loads_the_revision_and_the_code_that_the_run_had(exports: Path, server: str, program: str) -> None:
    assert "--revision" not in words_given(written(exports, server) / "start.sh", program)
    on_the_model_as_it_is(exports / "a-lora", revision="v2", trust_remote_code=True)
    folder = written(exports, server)
    words = words_given(folder / "start.sh", program)
    assert option(words, "--revision") == "v2" and "--trust-remote-code" in words
    assert "Python code of some/model at v2 runs in the server" in (folder / "README.md").read_text()


def test_adapters_on_two_revisions_of_a_model_lie_on_two_bases(exports: Path) -> None:
    for name, revision in (("a", "v1"), ("b", "v2")):
        if name != "a":
            shutil.copytree(exports / "a-lora", exports / f"{name}-lora")
        edit(exports / f"{name}-lora" / "adapter_config.json", base_model_name_or_path="some/model", revision=revision)
    for name in ("a", "b"):
        (exports / f"{name}-lora" / "base.json").unlink()
    with pytest.raises(UserError, match="one base") as several:
        written(exports, "vllm")
    assert "a on some/model at v1; b on some/model at v2" in several.value.where


def test_without_a_fingerprint_the_recipe_says_the_dtype_and_the_template_arguments(exports: Path) -> None:
    on_the_model_as_it_is(exports / "a-lora", dtype="float16", template_arguments={"enable_thinking": False})
    (exports / "a-lora" / "fingerprint.json").unlink()
    folder = written(exports, "vllm")
    assert option(words_given(folder / "start.sh", "vllm"), "--dtype") == "float16"
    request = json.loads((folder / "tasks.json").read_text())["tasks"]["a"]
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_base_of_its_own_has_the_template_arguments_as_its_defaults(exports: Path) -> None:
    recipe = yaml.safe_load((exports / "a-lora" / "recipe.yaml").read_text())
    recipe["model"]["template_arguments"] = {"enable_thinking": False}
    (exports / "a-lora" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (exports / "a-lora" / "fingerprint.json").unlink()
    assert json.loads((written(exports, "vllm") / "tasks.json").read_text())["tasks"]["a"] == {"model": "a"}


@pytest.mark.parametrize("server", ["llama-server", "ollama"])
def test_a_base_on_the_hub_is_fetched_to_be_converted(exports: Path, tmp_path: Path, server: str) -> None:
    on_the_model_as_it_is(gguf_of(exports), revision="v2")
    script = written(exports, server) / "convert.sh"
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nprintf "%s\\n" "$@"\n')
    (programs / "python").chmod(0o755)
    (tmp_path / "huggingface_hub.py").write_text("def snapshot_download(*args, **more): return f'/hub {args} {more}'\n")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[1] == "/hub ('some/model',) {'revision': 'v2'}"


def test_files_of_llama_cpp_alone_say_by_their_recipe_what_they_lie_on(exports: Path) -> None:
    shutil.rmtree(exports / "a-lora")
    with pytest.raises(UserError, match="Nothing says what") as refused:
        (exports / "b-gguf").mkdir()
        (exports / "b-gguf" / "b.gguf").touch()
        written(exports, "llama-server")
    assert refused.value.where == str(exports / "b-gguf")


def test_a_file_of_llama_cpp_on_an_earlier_base_is_refused(exports: Path) -> None:
    edit(gguf_of(exports) / "base.json", projector="of an earlier run")
    with pytest.raises(UserError, match="lies on another base"):
        written(exports, "llama-server")
    shutil.rmtree(exports / "base")
    with pytest.raises(UserError, match="is not there") as missing:
        written(exports, "ollama")
    assert missing.value.where == str(exports / "base")


def test_llama_server_and_ollama_are_told_the_ends_and_the_limits_of_the_export(exports: Path) -> None:
    gguf = on_the_model_as_it_is(gguf_of(exports))
    (gguf / "generation_config.json").write_text('{"eos_token_id": [263], "stop_strings": ["<\\"end>"]}')
    images = {"size": {"shortest_edge": 3136, "longest_edge": 6272}, "patch_size": 14, "merge_size": 2}
    (gguf / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    folder = written(exports, "llama-server")
    (folder / "mmproj.gguf").touch()
    words = words_given(folder / "start.sh", "llama-server")
    assert option(words, "--override-kv") == "tokenizer.ggml.eot_token_id=int:263"
    assert [option(words, f"--image-{which}-tokens") for which in ("min", "max")] == ["4", "8"]
    assert "stop_token_ids" not in json.loads((folder / "tasks.json").read_text())["tasks"]["a"]
    assert 'PARAMETER stop "<\\"end>"' in (written(exports, "ollama") / "a.Modelfile").read_text().splitlines()


def test_an_adapter_called_base_does_not_take_the_name_of_the_model_without_adapters(exports: Path) -> None:
    shutil.copytree(exports / "a-lora", exports / "base-lora")
    for server, program, named in (("vllm", "vllm", "base"), ("sglang", "python3", "base_:base")):
        folder = written(exports, server)
        assert option(words_given(folder / "start.sh", program), "--served-model-name") == "base_"
        assert json.loads((folder / "tasks.json").read_text())["tasks"]["base"]["model"] == named
        assert "`base_" in (folder / "README.md").read_text()


def test_a_mixture_keeps_its_name_where_the_server_takes_it(exports: Path) -> None:
    name = "color=0.7+count=0.3"
    (exports / "a-lora").rename(exports / f"{name}-lora")
    for server, program, words, key in (
        ("vllm", "vllm", "--lora-modules", "name"),
        ("sglang", "python3", "--lora-paths", "lora_name"),
    ):
        given = option(words_given(written(exports, server) / "start.sh", program), words)
        assert json.loads(given)[key] == name
    shutil.copytree(exports / f"{name}-lora", exports / "a-lora")
    gguf_of(exports).rename(exports / f"{name}-gguf")
    folder = written(exports, "ollama")
    called = words_given(folder / "start.sh", "ollama")[1]
    assert set(called) <= set(string.ascii_letters + string.digits + "_-.") and called.startswith(
        "color_0.7_count_0.3-"
    )
    assert json.loads((folder / "tasks.json").read_text())["tasks"][name]["model"] == called
    assert f"--name {called}:latest" in (folder / "README.md").read_text()


def test_a_converted_base_survives_a_failure_and_a_link_to_one_stays(
    exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_of(exports)
    folder = written(exports, "llama-server")
    (folder / "base.gguf").write_text("converted")
    (folder / "mmproj.gguf").symlink_to("../a-gguf/a.gguf")

    put_into_place = files._put_into_place

    def put_other_than_the_folder(temporary: Path, path: Path) -> None:
        if path == folder:
            raise OSError("such as one of permissions")
        put_into_place(temporary, path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="of permissions"):
        patched.setattr(files, "_put_into_place", put_other_than_the_folder)
        written(exports, "llama-server")
    assert (folder / "base.gguf").read_text() == "converted"
    written(exports, "llama-server")
    assert (folder / "base.gguf").read_text() == "converted" and (folder / "mmproj.gguf").is_symlink()


def test_a_base_that_was_converted_of_another_one_is_not_served(exports: Path) -> None:
    gguf = gguf_of(exports)
    folder = written(exports, "llama-server")
    (folder / "base.gguf").touch()
    for file in (exports / "base" / "base.json", gguf / "base.json"):
        edit(file, projector="of a later run")
    with pytest.raises(UserError, match="of another base or type") as refused:
        written(exports, "llama-server")
    assert str(folder / "base.gguf") in refused.value.where and (folder / "base.gguf").is_file()
    (folder / "base.gguf").unlink()
    assert written(exports, "llama-server") == folder
