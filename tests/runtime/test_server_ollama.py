"""Ollama's interface by Ollama's own client; the counters; the page."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import ollama
import pytest
from server_support import HI, SCHEMA, Running, serving, write_tiny

from pocketslm import __version__
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Reply
from pocketslm.runtime.server.app import Answer, Limits
from pocketslm.runtime.tool_formats import Call


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = Model.load(write_tiny(tmp_path_factory.mktemp("ollama")), "native", threads=1)
    yield from serving(model, Limits(body=100_000, waiting=3, tokens=1500))


@pytest.fixture
def client(server: Running) -> Iterator[ollama.Client]:
    client = ollama.Client(f"http://127.0.0.1:{server.port}")
    yield client
    client._client.close()


def get(server: Running, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as reply:
        text: str = reply.read().decode()
    return text


def test_a_chat_and_its_stream(server: Running, client: ollama.Client) -> None:
    options = {"num_predict": 7, "temperature": 0.8, "seed": 3, "top_k": 9, "repeat_penalty": 1.2}
    options["typical_p"] = 0.9
    ours = server.model.reply(
        HI,
        max_new_tokens=7,
        temperature=0.8,
        seed=3,
        top_k=9,
        typical_p=0.9,
        repetition_penalty=1.2,
    )
    made = client.chat("tiny", HI, options=options)
    assert made.message.content == ours.text
    assert (made.done, made.done_reason) == (True, "length")
    assert (made.prompt_eval_count, made.eval_count) == (ours.prompt_tokens, 7)
    assert made.total_duration is not None
    assert made.total_duration >= (made.prompt_eval_duration or 0) > 0
    parts = list(client.chat("tiny:latest", HI, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == ours.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert 2 <= len(parts) <= 8  # tokens that a client waits for come together
    assert parts[-1].eval_count == 7


def test_the_oldest_turns_go_where_the_context_is_full(
    server: Running, client: ollama.Client
) -> None:
    turn = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y" * 300}]
    messages: Any = [{"role": "system", "content": "be brief"}, *turn, *turn, *turn, *HI]
    config = GenerationConfig(max_new_tokens=5)
    kept = server.model.fitting(messages, config)
    assert kept == [messages[0], *turn, *turn, *HI]
    made = client.chat("tiny", messages, options={"num_predict": 5})
    assert made.prompt_eval_count == len(server.model.prompt_ids(kept))
    whole = {"model": "tiny", "messages": messages, "truncate": False}
    with pytest.raises(ollama.ResponseError, match="do not fit"):
        client._request_raw("POST", "/api/chat", json=whole | {"options": {"num_predict": 5}})
    assert server.model.fitting(kept[-1:], config) == HI


def test_a_text(server: Running, client: ollama.Client) -> None:
    made = client.generate("tiny", "the inner", raw=True, options={"num_predict": 5})
    config = GenerationConfig(max_new_tokens=5)
    assert made.response == "".join(r.text for r in server.model.generate("the inner", config))
    asked = client.generate("tiny", "hi", system="be brief", options={"num_predict": 5})
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert asked.response == server.model.reply(messages, max_new_tokens=5).text
    assert client.generate("tiny").done_reason == "load"
    assert client.chat("tiny").done_reason == "load"


def test_a_format(client: ollama.Client) -> None:
    options = {"temperature": 1.0, "seed": 2}
    made = client.chat("tiny", HI, format=SCHEMA, options=options)
    assert made.done_reason == "stop"
    assert set(json.loads(made.message.content or "")) == {"yes", "n"}
    made = client.chat("tiny", HI, format="json", options=options | {"num_predict": 40})
    assert (made.message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: ollama.Client, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tools: Any = [{"type": "function", "function": {"name": "set", "parameters": SCHEMA}}]
    history = [
        *HI,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "set", "arguments": {"yes": True, "n": 1}}}],
        },
        {"role": "tool", "tool_name": "set", "content": "done"},
    ]
    options = {"num_predict": 3}
    made: Any = client.chat("tiny", history, tools=tools, options=options, stream=stream)
    assert [part.done for part in (made if stream else [made])][-1]
    call = Call("set", {"yes": True, "n": 7})
    reply = Reply("so", (1, 2), "eos", 9, (call,))  # a random model makes none
    monkeypatch.setattr(Answer, "with_tools", lambda *_: reply)
    made = client.chat("tiny", HI, tools=tools, stream=stream)
    parts = list(made) if stream else [made]
    assert "".join(part.message.content for part in parts) == "so"
    (found,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert found.function.name == call.name
    assert found.function.arguments == call.arguments
    assert (parts[-1].prompt_eval_count, parts[-1].eval_count) == (9, 2)


def test_what_there_is(server: Running, client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == "tiny"
    assert (listed.size or 0) > 1000
    shown = client.show("tiny")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == server.model.context
    assert shown.capabilities == ["completion", "tools"]
    assert shown.details is not None
    assert shown.details.family == "llama"
    assert json.loads(get(server, "/api/version")) == {"version": __version__}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"options": {"num_ctx": 100}}, "'num_ctx' is not supported"),
        ({"options": {"temperature": "hot"}}, "'temperature' is of the wrong type"),
        ({"options": {"seed": -1}}, "seed is -1"),
        ({"options": {"stop": [""]}}, "'stop' must be"),
        ({"format": "xml"}, "'format'"),
        ({"think": True}, "'think' other than False is not supported"),
        ({"streem": True}, "'streem' is not supported"),
        ({"messages": [{"role": "user", "content": "", "images": ["eA=="]}]}, "'images'"),
        ({"messages": [{"content": "x"}]}, "must have a role"),
    ],
)
def test_what_is_wrong_is_said(
    wrong: dict[str, Any], message: str, server: Running, client: ollama.Client
) -> None:
    body = {"model": "tiny", "messages": HI} | wrong
    with pytest.raises(ollama.ResponseError, match=message) as raised:
        client._request_raw("POST", "/api/chat", json=body)
    assert raised.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="no model 'other'") as missing:
        client.chat("other", HI)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does nothing with 'raw'"):
        client.generate("tiny", "x", system="y", raw=True)


def test_counters(server: Running, client: ollama.Client) -> None:
    def counted() -> dict[str, float]:
        text = get(server, "/metrics")
        for line in text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) .+|\w+\{(\w+="[^"]*",?)*\} [\d.e+-]+', line), line
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return {name: float(value) for name, value in rows}

    before = counted()
    made = client.chat("tiny", HI, options={"num_predict": 4})
    server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=3)
    with pytest.raises(urllib.error.HTTPError):
        get(server, "/nowhere")
    after = counted()

    def more(name: str) -> float:
        return after[f"pocketslm_{name}"] - before.get(f"pocketslm_{name}", 0)

    assert more('requests_total{route="/api/chat",status="200"}') == 1
    assert more('requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert more('requests_total{route="other",status="404"}') == 1
    assert more('generated_tokens_total{model="tiny"}') == 7
    assert more('prompt_tokens_total{model="tiny"}') == 2 * (made.prompt_eval_count or 0)
    assert more('answer_seconds_count{model="tiny"}') == 2
    assert more('first_token_seconds_bucket{model="tiny",le="+Inf"}') == 2
    assert after['pocketslm_waiting{model="tiny"}'] == 0


def test_the_page_needs_nothing_else(server: Running) -> None:
    url = f"http://127.0.0.1:{server.port}/"
    with urllib.request.urlopen(url) as reply:
        page = reply.read().decode()
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert not re.search(r"https?:|//\w|@import|url\(", page)

    class Tags(HTMLParser):
        found: set[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}
            self.found.add(tag)

    tags = Tags()
    tags.found = set()
    tags.feed(page)
    assert {"textarea", "script"} <= tags.found
    assert "link" not in tags.found
