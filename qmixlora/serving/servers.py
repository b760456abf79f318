"""Answers of a running server, over OpenAI's protocol; llama-server says by request which of its adapters apply."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
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
        with _of_protocol(self.url, content):
            choice = content["choices"][0]
            entries = (choice.get("logprobs") or {}).get("content") or []
            text, usage = choice["message"].get("content") or "", content.get("usage") or {}
            return Answer(tuple(_step(entry) for entry in entries), text, usage.get("prompt_tokens"))


def openai_server(url: str, fingerprint: Fingerprint, folder: str, name: str | None) -> Server:
    """The server at an address, as vLLM and SGLang are; the model asked is `name`, or the one called as the export.

    A server of one model alone is asked for that one. Raises UserError if there is no server, or no such model.
    """
    content = call(url, "/v1/models")
    with _of_protocol(url, content):
        served = {str(model["id"]): dict(model) for model in content["data"]}
    names = list(served)
    wanted = [name] if name else [fingerprint.name, folder.rstrip("/").rpartition("/")[2], folder]
    model = next((one for one in wanted if one in names), None if name or len(names) != 1 else names[0])
    if model is None:
        raise UserError(
            f"The server has no model called {wanted[0]!r}: it has {', '.join(names) or 'none'}.",
            where=url,
            fix="Say which one it is: --name.",
        )
    own = served[model]
    base = _base_below(own, served) if fingerprint.is_adapter else None
    if own.get("owned_by") == "sglang" and own.get("parent"):
        model = f"{own['parent']}:{model}"  # by its own name alone an adapter is left out there, without a word
    extra = {"chat_template_kwargs": fingerprint.template_arguments} if fingerprint.template_arguments else {}
    return Server(url, model, base, extra, extra)


def llama_server(url: str, fingerprint: Fingerprint, folder: str, name: str | None) -> Server:
    """llama.cpp's server, which takes a scale for each of its adapters. Raises UserError as `openai_server`."""
    told, props = call(url, "/lora-adapters"), call(url, "/props")
    with _of_protocol(url, [told, props]):
        adapters = [(one["id"], str(one.get("path", "")), one.get("task_name")) for one in told or []]
        sees = bool((props.get("modalities") or {}).get("vision", False))
    wanted = name or fingerprint.name
    own = _called(wanted, adapters) if fingerprint.is_adapter else []
    if fingerprint.is_adapter and adapters and len(own) != 1:
        paths = ", ".join(path for _, path, _ in adapters)
        raise UserError(f"Which adapter is {wanted!r}? The server has {paths}.", where=url, fix="Say it: --name.")
    without = [{"id": one, "scale": 0.0} for one, _, _ in adapters]
    scales = [{"id": one, "scale": float(one in own)} for one, _, _ in adapters]
    base = "base" if fingerprint.is_adapter and adapters else None
    return Server(url, wanted, base, {"lora": scales} if scales else {}, {"lora": without}, sees)


def _base_below(own: Mapping[str, Any], served: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The model below an adapter, by the parent that the adapter names: that one, or the only one that has no parent
    itself. None where it names none, as on a server of whole models.
    """
    if not own.get("parent"):
        return None
    roots = [name for name, model in served.items() if not model.get("parent")]
    return str(own["parent"]) if own["parent"] in served else roots[0] if len(roots) == 1 else None


def _called(wanted: str, adapters: Sequence[tuple[Any, str, str | None]]) -> list[Any]:
    """The ids of the adapters (id, path, task's name) that a name means: by what is exact first, since mixtures of the
    same tasks have one task's name.
    """
    stems = [(one, path, path.rpartition("/")[2].removesuffix(".gguf"), task) for one, path, task in adapters]
    matches = [
        [one for one, path, _, _ in stems if path == wanted],
        [one for one, _, stem, _ in stems if stem == wanted],
        [one for one, _, _, task in stems if task == wanted],
        [one for one, _, stem, _ in stems if stem.startswith((f"{wanted}-", f"{wanted}.", f"{wanted}_"))],
    ]
    return next((ids for ids in matches if ids), [])


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
        try:
            with urllib.request.urlopen(made, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:500]
            raise CheckError(f"The server refuses ({error.code}): {said}", where=address) from error
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"No server answers: {error}", where=address, fix="Start it, or name its address: http://HOST:PORT."
        ) from error


@contextmanager
def _of_protocol(url: str, content: Any) -> Iterator[None]:
    """Turn what comes of taking apart an answer of another shape into one clear message."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"This is no answer of OpenAI's protocol: {str(content)[:200]}",
            where=url,
            fix="Name the address without /v1, as in http://127.0.0.1:8000.",
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
