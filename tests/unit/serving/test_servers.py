"""Servers that answer in other shapes, or list their models and adapters in their own ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qmixlora.errors import UserError
from qmixlora.serving.check import check
from qmixlora.serving.fingerprint import Answer, Fingerprint, Prompt, Step
from qmixlora.serving.servers import Server, llama_server, openai_server

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}]


@dataclass
class Stub:
    """A server that gives the same replies whatever it is asked, by path."""

    url: str
    replies: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def stub() -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(made.replies[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Stub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def fingerprint_of(name: str, form: str = "lora") -> Fingerprint:
    """Of one prompt, whose answer is `yes`, and `no` of the base."""
    answers = {whose: Answer((Step(None, text, -0.1),), text, 5) for whose, text in (("export", "yes"), ("base", "no"))}
    return Fingerprint(name, form, "float32", 4, [Prompt(MESSAGES, answers)])


def models(*names: str, **parents: str) -> dict[str, Any]:
    return {"data": [{"id": name, "parent": parents.get(name)} for name in names]}


@pytest.mark.parametrize(
    "content", [{"object": "list", "data": None}, [], {}, {"data": [{"name": "x"}]}, {"data": ["x"]}]
)
def test_a_list_of_models_of_another_shape_is_told(stub: Stub, content: Any) -> None:
    stub.replies["/v1/models"] = content
    with pytest.raises(UserError, match="no answer of OpenAI's protocol"):
        openai_server(stub.url, fingerprint_of("a"), "a", None)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"choices": [{"message": None}]},
        {"choices": [{"message": {}, "logprobs": {"content": [{"token": "a", "logprob": "?"}]}}]},
        {"choices": [{"message": {}, "logprobs": {"content": [{"token": "token_id:a", "logprob": 0}]}}]},
    ],
)
def test_an_answer_of_another_shape_is_told(stub: Stub, content: Any) -> None:
    stub.replies["/v1/chat/completions"] = content
    with pytest.raises(UserError, match="no answer of OpenAI's protocol"):
        Server(stub.url, "a", None, {}, {}).answer(MESSAGES, 4)


@pytest.mark.parametrize(("adapters", "props"), [({"error": "none"}, {}), ([{"path": "a.gguf"}], {}), ([], [])])
def test_a_llama_server_of_another_shape_is_told(stub: Stub, adapters: Any, props: Any) -> None:
    stub.replies.update({"/lora-adapters": adapters, "/props": props})
    with pytest.raises(UserError, match="no answer of OpenAI's protocol"):
        llama_server(stub.url, fingerprint_of("a", "gguf"), "a", None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://127.0.0.1:80 80", "127.0.0.1:80"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(UserError, match="No server answers"):
        openai_server(url, fingerprint_of("a"), "a", None)


def test_the_base_is_the_parent_that_an_adapter_names(stub: Stub) -> None:
    for served, base in (
        (models("a:latest", "b:latest"), None),  # Ollama's: the other one is another task
        (models("base", "a:latest", **{"a:latest": "base"}), "base"),
        (models("base", "alias", "a:latest", **{"a:latest": "alias"}), "alias"),
        (models("base", "a:latest", **{"a:latest": "/weights"}), "base"),
        (models("base", "alias", "a:latest", **{"a:latest": "/weights"}), None),
    ):
        stub.replies["/v1/models"] = served
        assert openai_server(stub.url, fingerprint_of("a"), "a", "a:latest").base == base
        assert openai_server(stub.url, fingerprint_of("a", "merged"), "a", "a:latest").base is None


def test_llama_servers_adapters_are_told_apart_by_what_is_exact(stub: Stub) -> None:
    """Mixtures of the same tasks have one task's name, whatever their shares."""
    paths = ["color+count", "color=0.7+count=0.3", "size-f16", "file"]
    paths = [*(f"/x/{stem}.gguf" for stem in paths), "/y/twice.gguf", "/z/twice.gguf"]
    tasks = ["color+count", "color+count", None, "shape", "twice", "twice"]
    listed = [
        {"id": i, "path": path, "task_name": task} for i, (path, task) in enumerate(zip(paths, tasks, strict=True))
    ]
    stub.replies.update({"/lora-adapters": listed, "/props": {"modalities": None}})

    def applied(name: str, form: str = "gguf", as_named: str | None = None) -> list[int]:
        asked = llama_server(stub.url, fingerprint_of(name, form), name, as_named)
        assert not asked.sees
        return [one["id"] for one in asked.extra["lora"] if one["scale"]]

    names = ("color+count", "color=0.7+count=0.3", "size", "shape")
    assert [applied(name) for name in names] == [[0], [1], [2], [3]]
    assert applied("a", as_named="color=0.7+count=0.3") == [1] and applied("a", as_named="/z/twice.gguf") == [5]
    for name in ("twice", "other"):
        with pytest.raises(UserError, match=f"Which adapter is '{name}'"):
            applied(name)
    assert applied("size", "merged") == [], "a whole model is asked without any"


@pytest.mark.parametrize(("usage", "said"), [(None, "tells no lengths"), ({"prompt_tokens": 5}, "the right lengths")])
def test_lengths_are_called_right_where_the_server_tells_them(stub: Stub, usage: Any, said: str) -> None:
    stub.replies["/v1/models"] = models("a")
    stub.replies["/v1/chat/completions"] = {"choices": [{"message": {"content": "hello"}}], "usage": usage}
    fingerprint = fingerprint_of("a")
    report = check(fingerprint, openai_server(stub.url, fingerprint, "a", None))
    assert report.verdict == "something else" and len(report.reasons) == 1 and said in report.reasons[0]
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["against"]["export"] == {"same": 0, "mean_difference": None, "largest_difference": None}
