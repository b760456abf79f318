"""A real headless Chromium, spoken to in the DevTools protocol over pipes (no further package)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MOVE = "import os, sys; [os.dup2(int(sys.argv[n]), 2 + n) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One page of a browser. `said` are its console's messages, errors and failed requests; `asked` its requests."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self.process, self.write, self.read, self.buffer = process, write, read, b""
        self.number, self.session = 0, None
        self.said: list[str] = []
        self.asked: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path | str, width: int, *, dark: bool = False, media: str = "screen") -> None:
        """Show a file, or what is at an address, in a window of this width, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.loaded = False
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]

    def screenshot(self, file: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, told = message.get("method", ""), message.get("params", {})
        self.loaded |= method == "Page.loadEventFired"
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"):
            self.said.append(json.dumps(told))
        if method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder, for a block."""
    assert CHROMIUM is not None
    to_child, write = os.pipe()
    read, from_child = os.pipe()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "--no-first-run"]
    # the browser reads commands from file 3 and writes answers to file 4
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)]
    start = [sys.executable, "-c", MOVE, *map(str, moved)]
    with subprocess.Popen([*start, *command], pass_fds=moved, stderr=subprocess.DEVNULL) as process:
        for end in (to_child, from_child, *moved):
            os.close(end)
        try:
            yield Browser(process, write, read)
        finally:
            process.terminate()
            process.wait()
            os.close(write)
            os.close(read)
