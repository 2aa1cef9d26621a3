"""The server as its clients see it: OpenAI's own client, and others that do not behave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_support import HI, SCHEMA, Running, serving, write_tiny

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
from pocketslm.runtime.server.line import Limits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    model = Model.load(tiny, "native", threads=1)
    yield from serving(model, Limits(body=100_000, waiting=3, tokens=1500))


def test_a_chat(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    made = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=7)
    reply = server.model.reply(HI, max_new_tokens=7)
    assert made.choices[0].message.content == reply.text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 7
    assert made.usage.prompt_tokens == reply.prompt_tokens


def test_options_of_sampling(server: Running) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    more = {"top_k": 5, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.3}
    made = server.client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=12, extra_body=more, **options
    )
    ours = server.model.reply(HI, max_new_tokens=12, **options, **more)
    assert made.choices[0].message.content == ours.text
    without = server.model.reply(HI, max_new_tokens=12, **options)
    assert ours.text != without.text


def test_a_stream_is_the_whole(server: Running) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 12}
    whole = server.client.chat.completions.create(model="tiny", messages=HI, **options)
    stream = server.client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_logprobs_and_stop(server: Running) -> None:
    made = server.client.chat.completions.create(
        model="tiny", messages=HI, logprobs=True, max_tokens=4
    )
    scores = made.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == 4
    ours = list(
        server.model.generate(
            server.model.prompt_ids(HI), GenerationConfig(max_new_tokens=4, logprobs=True)
        )
    )
    for score, record in zip(scores.content, ours, strict=True):
        assert record.logprob is not None
        assert abs(score.logprob - record.logprob) < 1e-4
    text = made.choices[0].message.content or ""
    stopped = server.client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=4, stop=[text[1:2]]
    )
    assert stopped.choices[0].message.content == text[: text.index(text[1:2])]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(server: Running, stream: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 6, "n": 3, "seed": 4}
    made: Any = server.client.chat.completions.create(
        model="tiny", messages=HI, stream=stream, **options
    )
    texts = ["", "", ""]
    if stream:
        for chunk in made:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        for choice in made.choices:
            texts[choice.index] = choice.message.content
        assert made.usage.completion_tokens == 18
    for number, text in enumerate(texts):
        ours = server.model.reply(HI, temperature=0.9, max_new_tokens=6, seed=4 + number)
        assert text == ours.text


def test_a_text_is_continued(server: Running) -> None:
    made = server.client.completions.create(model="tiny", prompt="the inner", max_tokens=5)
    config = GenerationConfig(max_new_tokens=5)
    ours = "".join(record.text for record in server.model.generate("the inner", config))
    assert made.choices[0].text == ours


def test_answers_with_a_structure(server: Running) -> None:
    for form in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
    ):
        made = server.client.chat.completions.create(
            model="tiny", messages=HI, response_format=form, temperature=1.0, seed=2
        )
        if made.choices[0].finish_reason == "stop":
            value = json.loads(made.choices[0].message.content or "")
            assert isinstance(value, dict)
            if form["type"] == "json_schema":
                assert set(value) == {"yes", "n"}


@pytest.mark.parametrize("stream", [False, True])
def test_tools(server: Running, stream: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "set", "parameters": SCHEMA}}]
    choice: Any = {"type": "function", "function": {"name": "set"}}
    made: Any = server.client.chat.completions.create(
        model="tiny", messages=HI, tools=tools, tool_choice=choice, stream=stream
    )
    if stream:
        chunks = list(made)
        message, finish = chunks[0].choices[0].delta, chunks[-1].choices[0].finish_reason
    else:
        message, finish = made.choices[0].message, made.choices[0].finish_reason
    assert finish == "tool_calls"
    (call,) = message.tool_calls
    assert call.function.name == "set"
    assert set(json.loads(call.function.arguments)) == {"yes", "n"}


DEEP = {"type": "function", "function": {"name": "a", "arguments": "[" * 3000 + "]" * 3000}}


def test_what_is_wrong_is_said(server: Running) -> None:
    create: Any = server.client.chat.completions.create
    for wrong, message in (
        ({"messages": []}, "'messages' must be"),
        ({"messages": HI, "n": 9}, "'n' is 9, expected 1 to 8"),
        ({"messages": HI, "temperature": -1}, "temperature"),
        ({"messages": HI, "stop": ["a"] * 9}, "'stop' must be"),
        ({"messages": HI, "extra_body": {"tempature": 1}}, "'tempature' is not supported"),
        ({"messages": HI, "response_format": {"type": "xml"}}, "'response_format'"),
        ({"messages": HI, "stream": True, "seed": -1}, "seed is -1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "other than text"),
        (
            {
                "messages": HI,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                },
            },
            "'not' is not supported",
        ),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "do not fit"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "'content' of a message must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "must be a text",
        ),
        ({"messages": [{"role": "user", "tool_calls": 5}]}, "'tool_calls' of a message"),
        ({"messages": [{"role": "user", "tool_calls": [DEEP]}]}, "arguments of a call"),
        ({"messages": HI, "extra_body": {"tools": ["clock"]}}, "a tool's name"),
        ({"messages": HI, "extra_body": {"temperature": 10**400}}, "temperature"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            create(model="tiny", **wrong)
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        create(model="other", messages=HI)
    with pytest.raises(openai.APIStatusError) as large:
        create(model="tiny", messages=[{"role": "user", "content": "x" * 200_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="has no embeddings"):
        server.client.embeddings.create(model="tiny", input="a")


def raw(port: int, data: bytes, *, read: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(data)
        connection.settimeout(10)
        return connection.recv(1 << 16) if read else b""


def post(body: bytes, host: str = "localhost") -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def test_clients_that_do_not_behave(server: Running) -> None:
    long = json.dumps({"messages": HI, "max_tokens": 1500, "stream": True}).encode()
    for _ in range(8):  # each leaves at once, or after the first words
        raw(server.port, post(long), read=False)
        raw(server.port, post(long))
    assert b" 400 " in raw(server.port, post(b"rubbish"))
    assert b" 400 " in raw(server.port, post(b"[" * 50_000))
    assert b" 400 " in raw(server.port, b"GET\r\n\r\n")
    assert b" 400 " in raw(server.port, post(long, host="evil.example"))  # a name of its own
    deadline = time.monotonic() + 60
    while b'"waiting":0' not in raw(
        server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    ):
        assert time.monotonic() < deadline, "a slot was lost"
        time.sleep(0.05)
    test_a_chat(server)


def test_too_many_at_once(server: Running) -> None:
    results: list[str] = []

    def ask() -> None:
        try:
            server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=600)
            results.append("answered")
        except openai.InternalServerError as error:
            results.append("busy" if "busy" in str(error) else str(error))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {"answered", "busy"}
    assert results.count("answered") >= 3


def test_a_key_and_a_time_limit(tiny: Path) -> None:
    model = Model.load(tiny, "native", threads=1)
    for running in serving(model, Limits(seconds=0.01), key="secret"):
        wrong = running.client.with_options(api_key="guess")
        with pytest.raises(openai.AuthenticationError, match="API key"):
            wrong.models.list()
        assert running.client.models.list().data
        with pytest.raises(openai.APIStatusError) as late:
            running.client.chat.completions.create(
                model="tiny",
                messages=HI,
                max_tokens=2000,
                logprobs=True,  # which nothing is guessed of
            )
        assert late.value.status_code == 504


def test_the_command_listens_on_this_machine_only(tiny: Path, monkeypatch: Any) -> None:
    from pocketslm.cli import main

    monkeypatch.delenv("POCKETSLM_API_KEY", raising=False)
    assert main(["serve", str(tiny), "--host", "0.0.0.0"]) == 2
    assert main(["serve", str(tiny), "--host", "example.org"]) == 2
