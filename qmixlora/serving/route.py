"""The scales with which to ask llama-server for an instruction: the router of a live mixture, without torch.

    python route.py "What is in this picture?" --image

prints the `lora` of a request, as JSON. It needs numpy, safetensors and tokenizers, and reads `router.safetensors`
(whose metadata has the rule in words) and `tokenizer.json` beside this file. `--image`: the question has an image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer


def scales(folder: Path, instruction: str, image: bool = False) -> list[dict[str, Any]]:
    """The factors that work for an instruction: the numbers of their files, and the scales of these."""
    with safe_open(folder / "router.safetensors", "np") as file:
        rule, names = json.loads(file.metadata()["rule"]), set(file.keys())
        before, after = rule["prompts"][int(image)]
        text = before + instruction.strip() + after
        found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        ids = [token for token in rule["begin"] + found if token not in rule["image_tokens"]]
        embeddings = file.get_slice("embeddings")
        rows = np.concatenate([embeddings[token : token + 1] for token in ids])
        if rows.dtype == np.uint16:  # bfloat16, which numpy does not know
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        condition = rows.astype(np.float32).mean(axis=0)
        if "center" in names:
            condition = (condition - condition.mean()) / np.sqrt(condition.var() + 1e-5) - file.get_tensor("center")
        routers = [file.get_tensor(name) for name in ("route_A", "route_B") if name in names]
    weights = np.ones(len(routers[0]))
    for router in routers:
        score = np.exp(router @ condition - (router @ condition).max())
        chosen = np.argsort(-score)[: rule["chosen"]]
        weighted = score / score[chosen].mean() if rule["is_weighted"] else np.ones(len(score))
        weights *= np.where(np.isin(np.arange(len(score)), chosen), weighted, 0)
    return [{"id": int(i), "scale": float(rule["share"] * weights[i])} for i in np.flatnonzero(weights)]


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--image"]
    print(json.dumps({"lora": scales(Path(__file__).parent, arguments[0], "--image" in sys.argv)}))
