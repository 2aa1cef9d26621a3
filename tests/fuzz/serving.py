"""The server's requests: a status that says who is at fault, never 500, and JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

from pocketslm.errors import UsageError

from . import mutate
from .target import Target

NAMES = ("tiny", "tiny+polite", "tiny+terse", "tiny+", "+polite", "tiny+rude", "", "tiny:latest")
HI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi é\U0001f642"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "tiny+polite", "messages": HI, "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                *HI,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                HI[1],
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            **{"temperature": 0.7, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["x"]},
            **{"logprobs": True, "max_tokens": 3, "user": "x", "presence_penalty": 0},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "tiny+terse",
            "messages": HI,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True},
            },
        },
    ),
    ("/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 2, "echo": False}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64"}),
    ("/api/chat", {"model": "tiny+polite", "messages": HI, "options": {"num_predict": 2}}),
    (
        "/api/chat",
        {
            "model": "tiny",
            "messages": HI,
            **{"stream": False, "format": PARAMETERS, "tools": [TOOL], "keep_alive": "5m"},
            "options": {"num_predict": 2, "temperature": 0.5, "top_k": 3, "stop": ["x"]},
        },
    ),
    ("/api/generate", {"model": "tiny", "prompt": "the", "system": "x", "raw": False}),
    ("/api/show", {"model": "tiny+polite"}),
    ("/api/embed", {"model": "tiny", "input": "a", "truncate": True}),
]
GETS = ("/api/tags", "/v1/models", "/metrics", "/health")
GOOD = {200, 400, 401, 404, 405, 413, 503, 504}


class Requests(Target):
    """Bodies of every route, for a model with two adapters."""

    name = "request"
    covers = ("runtime/server/*.py", "runtime/tool_formats.py", "runtime/calls.py")
    cpu_seconds = 20

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.runtime.model import Model
        from pocketslm.runtime.server.app import application
        from pocketslm.runtime.server.line import Limits

        super().__init__(home, scratch)
        self.model = Model.load(home / "bundle", "native", threads=1, parallel=2)
        limits = Limits(body=1 << 17, tokens=4, seconds=15)
        self.app = application({"tiny": self.model}, limits, key=None, hosts=["localhost"])
        self.loop = asyncio.new_event_loop()

    def seeds(self) -> list[bytes]:
        made = [path.encode() + b"\0" + json.dumps(body).encode() for path, body in SEEDS]
        return [*made, *super().seeds()]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        path, _, body = data.partition(b"\0")
        if rng.random() < 0.05:
            path = rng.choice([*GETS, *(path for path, _ in SEEDS)]).encode()
        if rng.random() < 0.1:
            body = body.replace(b'"tiny"', json.dumps(rng.choice(NAMES)).encode())
        changed = mutate.binary(body, rng) if rng.random() < 0.05 else mutate.json_tree(body, rng)
        return path + b"\0" + changed

    def feed(self, name: str, content: bytes) -> None:
        status, kind, body = self.loop.run_until_complete(self._ask(name, content))
        assert status in GOOD, (status, body[:500])
        if kind.startswith("application/json"):
            json.loads(body, parse_constant=_no_json)
        elif kind.startswith("text/event-stream"):
            for line in body.decode().splitlines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    json.loads(line[6:], parse_constant=_no_json)
        elif "ndjson" in kind:
            for line in body.decode().splitlines():
                json.loads(line, parse_constant=_no_json)
        if status != 200:
            raise UsageError(body.decode("utf-8", "replace")[:200])

    async def _ask(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        sent, answer, head = False, bytearray(), dict[str, Any]()
        over = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await over.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
            else:
                answer.extend(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET" if path in GETS else "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        try:
            await self.app(scope, receive, send)
        finally:
            over.set()
        kind = dict(head.get("headers", ())).get(b"content-type", b"").decode()
        return head["status"], kind, bytes(answer)

    def close(self) -> None:
        self.loop.close()
        self.model.close()


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


TARGETS = (Requests,)
