"""What SECURITY.md promises, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine

TOKEN = "hf_" + "aB3" * 11
TURNS = [{"from": "human", "value": "<image> what digit is written ?"}, {"from": "gpt", "value": "seven"}]


@pytest.fixture
def naming(tmp_path: Path, image: Path) -> Callable[[str], Path]:
    """A data file in a folder of its own that names an image, of which there is one outside and one inside."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    shutil.copyfile(image, folder / "images" / "inside.png")
    shutil.copyfile(image, tmp_path / "outside.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)

    def make(name: str) -> Path:
        rows = [{"image": name.format(tmp=tmp_path), "conversations": TURNS}] * 4
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"

    return make


OUTSIDE = ["../outside.png", "{tmp}/outside.png", "file://{tmp}/outside.png", "images/link.png", "linked/outside.png"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("verb", ["train", "data"])
def test_data_names_no_file_outside_of_its_folder(
    qmixlora: CommandLine, recipe_file: Path, naming: Callable[[str], Path], name: str, verb: str
) -> None:
    data = [f"data.train={naming(name)}", "data.test="]
    done = qmixlora(verb, recipe_file, *data)
    said = done.stdout + done.stderr
    assert done.code in (1, 2), said
    for words in ("An image lies outside of", "data.image_root", "data.allow_outside: true", "row 0"):
        assert words in said


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_that_is_trusted_names_any_file(
    qmixlora: CommandLine, recipe_file: Path, naming: Callable[[str], Path], name: str
) -> None:
    done = qmixlora("inspect", recipe_file, "--samples", 1, f"data.train={naming(name)}", "data.allow_outside=true")
    assert done.code == 0 and "[4 image tokens]" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["images/inside.png", "./images/../images/inside.png", "{tmp}/set/images/inside.png"])
def test_images_below_the_folder_are_read_by_any_name(
    qmixlora: CommandLine, recipe_file: Path, naming: Callable[[str], Path], name: str
) -> None:
    assert qmixlora("inspect", recipe_file, "--samples", 1, f"data.train={naming(name)}").code == 0


def test_a_folder_above_makes_them_inside(
    qmixlora: CommandLine, recipe_file: Path, naming: Callable[[str], Path], tmp_path: Path
) -> None:
    data = [f"data.train={naming('{tmp}/outside.png')}", f"data.image_root={tmp_path}"]
    assert qmixlora("inspect", recipe_file, "--samples", 1, *data).code == 0


def test_a_run_of_an_earlier_release_reads_what_it_was_trained_on(
    qmixlora: CommandLine, copied_run: Path, naming: Callable[[str], Path]
) -> None:
    recipe = (copied_run / "recipe.yaml").read_text()
    own = [line for line in recipe.splitlines() if "allow_outside" not in line]
    assert len(own) == len(recipe.splitlines()) - 1
    (copied_run / "recipe.yaml").write_text("\n".join(own).replace("test.json", "rows.json"))
    rows = naming("{tmp}/outside.png")
    text = (copied_run / "recipe.yaml").read_text()
    [test] = [line for line in text.splitlines() if line.startswith("  test:")]
    (copied_run / "recipe.yaml").write_text(text.replace(test, f"  test: {rows}"))
    assert qmixlora("eval", copied_run).code == 0


SECRET = [
    ("data.train", f"https://{TOKEN}@host.org/rows.json"),
    ("model.id", f"https://me:{TOKEN}@huggingface.co/a/b"),
    ("data.image_root", "https://host/images?token=abcdef"),
]


@pytest.mark.parametrize(("key", "value"), SECRET)
def test_a_recipe_with_a_token_is_refused_without_saying_it(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, key: str, value: str
) -> None:
    for arguments in (("train", recipe_file, f"{key}={value}"), ("train", recipe_file, "--dry-run", f"{key}={value}")):
        done = qmixlora(*arguments)
        assert done.code == 2 and f"{key}: a token or password" in done.stderr
        assert TOKEN not in done.stdout + done.stderr and "abcdef" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_token_of_the_environment_is_in_no_file_of_a_run(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = qmixlora("train", recipe_file, "train.save_every=2")
    assert done.code == 0 and qmixlora("export", tmp_path / "run", "--task", "digit", "--polish", 0).code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


CODE = """
from pathlib import Path
from transformers import LlavaConfig

Path(__file__).with_name("ran").touch()


class OwnConfig(LlavaConfig):
    model_type = "own"
"""


@pytest.fixture
def with_code(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder brings a Python file of its own. (transformers copies it below HF_HOME before it is run.)"""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(backbone, tmp_path / "with code"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_code_of_a_model_is_not_run_unless_the_recipe_says_so(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, with_code: Path, verb: str
) -> None:
    done = qmixlora(verb, recipe_file, f"model.id={with_code}")
    assert done.code == 2 and not list(tmp_path.rglob("ran")), done.stderr


def test_code_that_may_run_is_told(qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, with_code: Path) -> None:
    done = qmixlora("train", recipe_file, f"model.id={with_code}", "model.trust_remote_code=true")
    assert f"Python code of {with_code}" in done.stderr and list(tmp_path.rglob("ran")), done.stderr
