"""A server of OpenAI's protocol, in a process of its own: stock transformers and PEFT behind http.server.

    python server.py MODEL NAME=ADAPTER ...

It serves the model as `base` and every adapter by its name; under `/sglang` as SGLang does, `base:NAME` alone being the
adapter; or, as llama-server, adapters by scales in the request (and says there that it takes no images). It prints
its port, and stops when its input ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.image_utils import load_images


class Engine:
    """The model and its adapters, one request at a time."""

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        self.processor, self.lock = AutoProcessor.from_pretrained(model), threading.Lock()
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self.eos = self.model.generation_config.eos_token_id
        for name, folder in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()

    def answer(self, request: dict[str, Any], adapter: str | None) -> dict[str, Any]:
        with self.lock, torch.no_grad():
            if adapter is not None:
                self.model.set_adapter(adapter)
                return self._answer(request)
            if isinstance(self.model, PeftModel):
                with self.model.disable_adapter():
                    return self._answer(request)
            return self._answer(request)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        messages = [{**m, "content": [part_of(part) for part in m["content"]]} for m in request["messages"]]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        config = GenerationConfig(do_sample=False, max_new_tokens=request.get("max_tokens", 4), eos_token_id=self.eos)
        made = self.model.generate(
            **inputs, generation_config=config, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )
        length = inputs["input_ids"].shape[1]
        content = []
        for token, logits in zip(made.sequences[0, length:].tolist(), made.logits, strict=True):
            values, ids = logits[0].log_softmax(-1).topk(request.get("top_logprobs", 1))
            others = [
                {"token": f"token_id:{i}", "logprob": float(v)} for i, v in zip(ids.tolist(), values, strict=True)
            ]
            content.append({"token": f"token_id:{token}", "logprob": float(logits[0].log_softmax(-1)[token])})
            content[-1]["top_logprobs"] = others
        text = self.processor.tokenizer.decode(made.sequences[0, length:], skip_special_tokens=True)
        choice = {"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}
        return {"choices": [choice], "usage": {"prompt_tokens": length}}


def part_of(part: dict[str, Any]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": "image", "image": load_images(part["image_url"]["url"])}


def handler(engine: Engine, names: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            replies: dict[str, Any] = {
                "/v1/models": {"data": [{"id": "base"}, *({"id": name, "parent": "base"} for name in names)]},
                "/sglang/v1/models": {"data": [
                    {"id": "base", "owned_by": "sglang", "parent": None},
                    *({"id": name, "owned_by": "sglang", "parent": "base"} for name in names),
                ]},
                "/lora-adapters": [{"id": i, "path": f"/x/{name}.gguf", "scale": 0.0} for i, name in enumerate(names)],
                "/props": {"modalities": {"vision": False}},
            }  # fmt: skip
            self.reply(200, replies[self.path])

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            adapter = None if request["model"] == "base" else request["model"]
            if self.path.startswith("/sglang"):
                adapter = request["model"].partition(":")[2] or None
            if "lora" in request:  # as llama-server is asked
                scaled = [entry["id"] for entry in request["lora"] if entry["scale"] == 1.0]
                adapter = names[scaled[0]] if scaled else None
            if adapter is None or adapter in names:
                self.reply(200, engine.answer(request, adapter))
            else:
                self.reply(404, {"error": f"The model {adapter} does not exist."})

        def reply(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("adapters", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapters = dict(text.split("=", 1) for text in options.adapters)
    engine = Engine(options.model, adapters)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(engine, list(adapters)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
