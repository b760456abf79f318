"""Answers of a running server, over OpenAI's protocol; llama-server says by request which of its adapters apply."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmixlora.errors import CheckError, UserError

from .fingerprint import Answer, Fingerprint, Message, Step

TIMEOUT = 600  # seconds for an answer: the first one of a server on a CPU
OTHERS = 5  # likeliest tokens that are asked for beside the chosen one
AS_ID = "token_id:"  # vLLM's form of a token by its id
PLAIN = {"temperature": 0, "top_p": 1, "repetition_penalty": 1.0, "seed": 0}


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol: its address, the model to ask, and the one without the adapter, if known.

    `extra` and `extra_of_base` go into the requests for the one and the other.
    """

    url: str
    model: str
    base: str | None
    extra: Mapping[str, Any]
    extra_of_base: Mapping[str, Any]
    sees: bool = True

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"

    def answer(self, messages: list[Message], max_tokens: int) -> Answer:
        """The model's answer. Raises CheckError if the server refuses."""
        return self._asked(self.model, messages, max_tokens, self.extra)

    def answer_of_base(self, messages: list[Message], max_tokens: int) -> Answer | None:
        """The answer without the adapter; None where that cannot be asked for."""
        return None if self.base is None else self._asked(self.base, messages, max_tokens, self.extra_of_base)

    def _asked(self, model: str, messages: list[Message], max_tokens: int, extra: Mapping[str, Any]) -> Answer:
        request = {"model": model, "messages": messages, "max_tokens": max_tokens, "logprobs": True, **PLAIN, **extra}
        request |= {"top_logprobs": OTHERS, "return_tokens_as_token_ids": True}
        content = call(self.url, "/v1/chat/completions", request)
        try:
            choice = content["choices"][0]
            entries = (choice.get("logprobs") or {}).get("content") or []
            text, prompt_tokens = choice["message"].get("content") or "", content.get("usage", {}).get("prompt_tokens")
            return Answer(tuple(_step(entry) for entry in entries), text, prompt_tokens)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"This is no answer of OpenAI's protocol: {str(content)[:200]}",
                where=self.url,
                fix="Name the address without /v1, as in http://127.0.0.1:8000.",
            ) from error


def openai_server(url: str, fingerprint: Fingerprint, folder: str, name: str | None) -> Server:
    """The server at an address, as vLLM and SGLang are; the model asked is `name`, or the one called as the export.

    A server of one model alone is asked for that one. Raises UserError if there is no server, or no such model.
    """
    served = call(url, "/v1/models").get("data", [])
    names = [str(model["id"]) for model in served]
    wanted = [name] if name else [fingerprint.name, folder.rstrip("/").rpartition("/")[2], folder]
    model = next((one for one in wanted if one in names), None if name or len(names) != 1 else names[0])
    if model is None:
        raise UserError(
            f"The server has no model called {wanted[0]!r}: it has {', '.join(names) or 'none'}.",
            where=url,
            fix="Say which one it is: --name.",
        )
    bases = [str(own["id"]) for own in served if own["id"] != model and not own.get("parent")]
    base = bases[0] if fingerprint.is_adapter and len(bases) == 1 else None
    own = next(one for one in served if one["id"] == model)
    if own.get("owned_by") == "sglang" and own.get("parent"):
        model = f"{own['parent']}:{model}"  # by its own name alone an adapter is left out there, without a word
    extra = {"chat_template_kwargs": fingerprint.template_arguments} if fingerprint.template_arguments else {}
    return Server(url, model, base, extra, extra)


def llama_server(url: str, fingerprint: Fingerprint, folder: str, name: str | None) -> Server:
    """llama.cpp's server, which takes a scale for each of its adapters. Raises UserError as `openai_server`."""
    adapters = list(call(url, "/lora-adapters") or [])
    wanted = name or fingerprint.name
    stems = {id(one): str(one.get("path", "")).rpartition("/")[2].removesuffix(".gguf") for one in adapters}
    own = [one for one in adapters if wanted in (stems[id(one)], one.get("task_name"))]
    own = own or [one for one in adapters if stems[id(one)].startswith((f"{wanted}-", f"{wanted}.", f"{wanted}_"))]
    if fingerprint.is_adapter and adapters and len(own) != 1:
        paths = ", ".join(str(one.get("path")) for one in adapters)
        raise UserError(f"Which adapter is {wanted!r}? The server has {paths}.", where=url, fix="Say it: --name.")
    without = [{"id": one["id"], "scale": 0.0} for one in adapters]
    scales = [{"id": one["id"], "scale": float(one in own)} for one in adapters]
    sees = bool(call(url, "/props").get("modalities", {}).get("vision", False))
    base = "base" if fingerprint.is_adapter and adapters else None
    return Server(url, wanted, base, {"lora": scales} if scales else {}, {"lora": without}, sees)


def call(url: str, path: str, request: Mapping[str, Any] | None = None) -> Any:
    """The server's answer to a request (of GET without one), as JSON.

    Raises:
        UserError: there is no server, or it says something else than JSON.
        CheckError: it refuses.
    """
    data = None if request is None else json.dumps(request).encode()
    address = f"{url.rstrip('/').removesuffix('/v1')}{path}"
    try:
        made = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(made, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:500]
        raise CheckError(f"The server refuses ({error.code}): {said}", where=address) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"No server answers: {error}", where=address, fix="Start it, or name its address: http://HOST:PORT."
        ) from error


def _step(entry: Mapping[str, Any]) -> Step:
    others: dict[int | str, float] = {}
    for other in entry.get("top_logprobs") or []:
        token, text = _named(other)
        others[text if token is None else token] = float(other["logprob"])
    token, text = _named(entry)
    return Step(token, text, float(entry["logprob"]), others)


def _named(entry: Mapping[str, Any]) -> tuple[int | None, str]:
    """The id of a token, where the server tells it, and its text."""
    text = str(entry["token"])
    if text.startswith(AS_ID):
        return int(text.removeprefix(AS_ID)), ""
    return entry.get("id"), text
