"""Keep other libraries' chatter out of our output."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from urllib.parse import urlsplit
from urllib.request import getproxies


def quiet() -> None:
    """Call before the heavy imports. Our own warnings stay; progress bars and notices of loading do not."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    offline_without_network()
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # fewer gaps between blocks on the card; the planner counts on it
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(?!qmixlora).*")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def offline_without_network() -> None:
    """Take what is on this machine where the hub's name cannot be looked up: trying each file that a model may have
    five times takes minutes. Behind a proxy the name need not be known here.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
