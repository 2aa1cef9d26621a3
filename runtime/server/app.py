"""The web application: OpenAI's routes over loaded models."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pocketslm.errors import PocketSlmError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record, Reply, TextModel
from pocketslm.runtime.server.requests import Asked, read_chat, read_completion, read_embeddings
from pocketslm.runtime.tokenizer import Tokenizer
from pocketslm.runtime.tools import reply_with_tools

# Why an answer ended, in OpenAI's words.
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", None: "stop"}


@dataclass(frozen=True)
class Limits:
    """Of one server.

    body: bytes of a request. waiting: requests that a model answers and that wait for it. seconds:
    of one answer, its waiting included. tokens: of one answer.
    """

    body: int = 4 << 20
    waiting: int = 16
    seconds: float = 600.0
    tokens: int = 4096


class _Stopping:
    """A TextModel whose generations fail once it is over."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name, self.backend, self.context = model.name, model.backend, model.context
        self.tokenizer: Tokenizer = model.tokenizer
        self.over = threading.Event()

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        with closing(self._model.generate(prompt, config)) as records:  # type: ignore[type-var]
            for record in records:
                if self.over.is_set():
                    raise TimeoutError
                yield record


class Line:
    """A model and who waits for it: as many answers at once as it makes."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.waiting = 0
        self._seats = asyncio.Semaphore(model.parallel)
        self._threads = ThreadPoolExecutor(model.parallel, "pocketslm-answer")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Have a seat at the model, until the time that is given.

        Raises HTTPException where too many wait, and TimeoutError.
        """
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, "the server is busy; try again later")
        until = time.monotonic() + self.limits.seconds
        self.waiting += 1
        try:
            await asyncio.wait_for(self._seats.acquire(), self.limits.seconds)
            try:
                yield until
            finally:
                self._seats.release()
        finally:
            self.waiting -= 1

    async def records(
        self, start: Callable[[], Iterator[Record]], until: float
    ) -> AsyncGenerator[Record, None]:
        """Records made in a thread; leaving the iterator early ends them. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Queue[Record | BaseException | None] = asyncio.Queue()
        over = threading.Event()

        def put(item: Record | BaseException | None) -> None:
            loop.call_soon_threadsafe(ready.put_nowait, item)

        def work() -> None:
            try:
                with closing(start()) as records:  # type: ignore[type-var]
                    for record in records:
                        put(record)
                        if over.is_set():
                            break
                put(None)
            except BaseException as error:
                put(error)

        working = loop.run_in_executor(self._threads, work)
        # One timer for all: to wait for each record with one of its own costs more than to send it.
        late = loop.call_later(until - time.monotonic(), ready.put_nowait, TimeoutError())
        try:
            while True:
                item = await ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            late.cancel()
            over.set()
            await asyncio.shield(working)  # the seat is free only then

    async def reply(self, make: Callable[[TextModel], Reply], until: float) -> Reply:
        """A reply made in a thread, which a cancel ends. Raises TimeoutError."""
        model = _Stopping(self.model)
        working = asyncio.get_running_loop().run_in_executor(self._threads, make, model)
        try:
            return await asyncio.wait_for(asyncio.shield(working), until - time.monotonic())
        finally:
            model.over.set()
            await asyncio.wait([working])  # as above


def application(
    models: Mapping[str, Model],
    limits: Limits | None = None,
    *,
    key: str | None = None,
    hosts: list[str] | None = None,
) -> Starlette:
    """The application for models by their names.

    key: what clients must send as ``Authorization: Bearer KEY``. hosts: the names by which it may
    be asked, so that a page of another site cannot reach this machine through a name of its own.
    """
    server = _Server(models, limits or Limits(), key)
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/embeddings", server.embed, methods=["POST"]),
        Route("/v1/models", server.list_models),
        Route("/health", server.health),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    handlers: Any = {HTTPException: _failed, PocketSlmError: _refused}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Server:
    def __init__(self, models: Mapping[str, Model], limits: Limits, key: str | None) -> None:
        self.limits = limits
        self.key = key
        self.lines = {name: Line(model, limits) for name, model in models.items()}

    async def health(self, _: Request) -> Response:
        waiting = sum(line.waiting for line in self.lines.values())
        return JSONResponse({"status": "ok", "waiting": waiting})

    async def list_models(self, request: Request) -> Response:
        self._check_key(request)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "pocketslm"}
            for name in self.lines
        ]
        return JSONResponse({"object": "list", "data": data})

    async def embed(self, request: Request) -> Response:
        name, texts, encoding = read_embeddings(await self._body(request))
        line, name = self._line(name)

        def embedded() -> tuple[Any, int]:
            return line.model.embed(texts), sum(len(line.model.tokenize(text)) for text in texts)

        async with line.turn():
            vectors, count = await asyncio.get_running_loop().run_in_executor(None, embedded)
        data = [
            {
                "object": "embedding",
                "index": at,
                "embedding": (
                    base64.b64encode(vector.tobytes()).decode()
                    if encoding == "base64"
                    else vector.tolist()
                ),
            }
            for at, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": name, "data": data, "usage": usage})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat(await self._body(request)))

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion(await self._body(request)))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        line, name = self._line(asked.model)
        answer = _Answer(line.model, asked, name, self.limits)
        if asked.stream:
            events = self._events(line, answer)
            first = await anext(events)  # what is wrong with the request is said with its status
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        work = asyncio.ensure_future(self._whole(line, answer))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                return Response(status_code=499)
            return JSONResponse(work.result())
        finally:
            gone.cancel()

    async def _whole(self, line: Line, answer: _Answer) -> dict[str, Any]:
        try:
            async with line.turn() as until:
                if answer.has_tools:
                    return answer.of_reply(await line.reply(answer.with_tools, until))
                async with aclosing(line.records(answer.start, until)) as records:
                    async for record in records:
                        answer.add(record)
                return answer.whole()
        except TimeoutError:
            raise HTTPException(504, "the answer took too long") from None

    async def _events(self, line: Line, answer: _Answer) -> AsyncGenerator[str, None]:
        try:
            async with line.turn() as until:
                if answer.has_tools:
                    reply = await line.reply(answer.with_tools, until)
                    yield answer.event(answer.delta_of(reply), None)
                    yield answer.event({}, "tool_calls" if reply.calls else FINISH[reply.finish])
                else:
                    role = {"role": "assistant"}
                    async with aclosing(line.records(answer.start, until)) as records:
                        async for record in records:
                            answer.add(record)
                            yield answer.event({**role, "content": record.text}, None, record)
                            role = {}
                    yield answer.event({}, FINISH[answer.finish])
        except TimeoutError:
            yield f"data: {json.dumps(_error('the answer took too long', 'timeout'))}\n\n"
        if answer.asked.usage:
            yield answer.event(None, None)
        yield "data: [DONE]\n\n"

    def _line(self, name: str) -> tuple[Line, str]:
        if not name and len(self.lines) == 1:
            name = next(iter(self.lines))
        if name not in self.lines:
            raise HTTPException(
                404, f"there is no model {name!r}; there are: {', '.join(self.lines)}"
            )
        return self.lines[name], name

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    async def _body(self, request: Request) -> dict[str, Any]:
        self._check_key(request)
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.limits.body:
                raise HTTPException(413, f"the request is larger than {self.limits.body} bytes")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise HTTPException(400, "the request must be a JSON object")
        return body


class _Answer:
    """One answer: how it starts, what came of it, and how it is told."""

    def __init__(self, model: Model, asked: Asked, name: str, limits: Limits) -> None:
        self.model, self.asked, self.name = model, asked, name
        self.chat = asked.messages is not None
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.texts: list[str] = []
        self.scores: list[dict[str, Any]] = []
        self.finish: Any = None
        self.made = 0
        self.config = model.options(**asked.options)
        most = min(self.config.max_new_tokens or limits.tokens, limits.tokens)
        self.ids: list[int] = []
        self.has_tools = bool(asked.tools) and asked.tool_choice != "none"
        if not self.has_tools:
            self.ids = (
                model.prompt_ids(asked.messages)
                if asked.messages is not None
                else model.tokenizer.encode(asked.prompt or "", add_special_tokens=True)
            )
            most = min(most, max(1, model.context - len(self.ids)))
        self.prompt_tokens = len(self.ids)
        self.config = self.config.but(max_new_tokens=most)

    def start(self) -> Iterator[Record]:
        return self.model.generate(self.ids, self.config)

    def with_tools(self, model: TextModel) -> Reply:
        asked, config = self.asked, self.config.but(logprobs=False)
        return reply_with_tools(model, asked.messages or [], asked.tools, asked.tool_choice, config)

    def add(self, record: Record) -> None:
        self.texts.append(record.text)
        self.finish = record.finish
        self.made += 1
        if self.config.logprobs:
            self.scores.append(self._score(record))

    def _score(self, record: Record) -> dict[str, Any]:
        data = self.model.tokenizer.token_bytes(record.token)
        return {
            "token": data.decode("utf-8", "replace"),
            "bytes": list(data),
            "logprob": record.logprob,
            "top_logprobs": [],
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.made,
            "total_tokens": self.prompt_tokens + self.made,
        }

    def whole(self) -> dict[str, Any]:
        text, finish = "".join(self.texts), FINISH[self.finish]
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if not self.chat:
            return self._body("text_completion", {**choice, "text": text, "logprobs": None})
        scores = {"content": self.scores} if self.config.logprobs else None
        message = {"role": "assistant", "content": text}
        return self._body("chat.completion", {**choice, "message": message, "logprobs": scores})

    def of_reply(self, reply: Reply) -> dict[str, Any]:
        message = self.delta_of(reply)
        for call in message.get("tool_calls", []):
            del call["index"]
        finish = "tool_calls" if reply.calls else FINISH[reply.finish]
        choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
        return self._body("chat.completion", choice)

    def delta_of(self, reply: Reply) -> dict[str, Any]:
        self.prompt_tokens, self.made = reply.prompt_tokens, len(reply.tokens)
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
        calls = [
            {
                "index": at,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for at, call in enumerate(reply.calls)
        ]
        return message | ({"tool_calls": calls} if calls else {})

    def event(
        self, delta: dict[str, Any] | None, finish: str | None, record: Record | None = None
    ) -> str:
        """One line of a stream; without a delta, the usage at its end."""
        choices: list[dict[str, Any]] = []
        if delta is not None:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
            if self.chat:
                choice["delta"] = delta
                if record and self.config.logprobs:
                    choice["logprobs"] = {"content": self.scores[-1:]}
            else:
                choice["text"] = delta.get("content", "")
            choices.append(choice)
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }
        if delta is None:
            body["usage"] = self.usage()
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _body(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "choices": [choice],
            "usage": self.usage(),
        }


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _chain(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _failed(_: Request, error: HTTPException) -> Response:
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return JSONResponse(_error(str(error.detail), kind), error.status_code)


def _refused(_: Request, error: PocketSlmError) -> Response:
    return JSONResponse(_error(str(error), "invalid_request_error"), 400)
