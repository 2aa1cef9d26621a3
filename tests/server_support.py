"""A server of a tiny model, as clients reach it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import uvicorn

import support
from pocketslm.export.pipeline import export_bundle
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.model import Model
from pocketslm.runtime.server.app import application
from pocketslm.runtime.server.line import Limits

TEMPLATE = """{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}"""
SCHEMA = {
    "type": "object",
    "properties": {
        "yes": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["yes", "n"],
    "additionalProperties": False,
}
HI: Any = [{"role": "user", "content": "hi"}]


@dataclass
class Running:
    """A server, the model behind it, and OpenAI's client."""

    port: int
    model: Model
    client: openai.OpenAI


def write_tiny(folder: Path) -> Path:
    """A bundle of a tiny model whose template shows tools."""
    config = replace(support.TINY, max_position_embeddings=2048)
    checkpoint = support.write_hf(folder / "hf", config)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    export_bundle(open_checkpoint(checkpoint), folder / "bundle")
    return folder / "bundle"


def serving(model: Model, limits: Limits, key: str | None = None) -> Iterator[Running]:
    """The server over a model called "tiny", in a thread of its own."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = application({"tiny": model}, limits, key=key, hosts=["localhost", "127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=key or "none", max_retries=0
    )
    with client:
        yield Running(port, model, client)
    server.should_exit = True
    thread.join()
    listening.close()
