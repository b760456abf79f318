"""Ask a task of the server:  python ask.py TASK "QUESTION" [IMAGE ...]

`tasks.json`, beside this file, has the server's address and what a request for each task says. Python alone is needed.
"""

import base64
import json
import mimetypes
import sys
import urllib.request
from pathlib import Path
from typing import Any


def image_part(file: str) -> dict[str, Any]:
    kind, data = mimetypes.guess_type(file)[0] or "image/png", base64.b64encode(Path(file).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def main() -> None:
    server = json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))
    if len(sys.argv) < 3 or sys.argv[1] not in server["tasks"]:
        sys.exit(f"{__doc__}\nTasks: {', '.join(server['tasks'])}")
    _, task, question, *images = sys.argv
    content = [*map(image_part, images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    request = {**server["tasks"][task], "messages": messages, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{server['url']}/v1/chat/completions", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(asked) as response:
        print(json.load(response)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
