"""Keep other libraries' chatter out of our output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Call before the heavy imports. Our own warnings stay; progress bars and notices of loading do not."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # fewer gaps between blocks on the card; the planner counts on it
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(?!qmixlora).*")
    import transformers

    transformers.utils.logging.disable_progress_bar()
