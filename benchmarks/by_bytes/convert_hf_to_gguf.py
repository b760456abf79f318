"""llama.cpp's converter, told of the tokenizer of the tests' tiny models: a token for every byte, and nothing merged.

It knows tokenizers by digests, and the server wants a merge: one that no text has, since its result is no token. Where
nothing is merged it does not matter how text is split before. CONVERTER names llama.cpp's own script.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(os.environ["CONVERTER"])
sys.path.insert(0, str(SCRIPT.parent))
from conversion.base import TextModel  # noqa: E402


def _splits_as_gpt2(self: Any, tokenizer: Any) -> str:
    self.gguf_writer.add_token_merges(["\u0100 \u0101"])
    return "gpt-2"


def _has_no_sentencepiece(self: Any) -> None:
    raise FileNotFoundError("tokenizer.model")


TextModel.get_vocab_base_pre = _splits_as_gpt2
TextModel._set_vocab_sentencepiece = _has_no_sentencepiece
runpy.run_path(str(SCRIPT), run_name="__main__")
