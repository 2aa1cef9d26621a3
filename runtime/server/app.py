"""The web application: OpenAI's routes over loaded models."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from importlib import resources
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pocketslm.errors import PocketSlmError
from pocketslm.runtime.answer import Finish
from pocketslm.runtime.embedding import Vector
from pocketslm.runtime.model import Model, Record, Reply, TextModel
from pocketslm.runtime.server import ollama
from pocketslm.runtime.server.line import Limits, Line
from pocketslm.runtime.server.metrics import MEDIA_TYPE, Measured, Metrics
from pocketslm.runtime.server.openai_words import OpenAI, error_body
from pocketslm.runtime.server.requests import Asked, read_chat, read_completion, read_embeddings
from pocketslm.runtime.tool_formats import Call
from pocketslm.runtime.tools import reply_with_tools

TOO_LONG = "the answer took too long"
PAGE = resources.files(__package__) / "page.html"
# The page may load nothing, and talk to this server alone.
PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


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
    server = Server(models, limits or Limits(), key)
    routes = [
        Route("/", _page),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/embeddings", server.embed, methods=["POST"]),
        Route("/v1/models", server.list_models),
        Route("/health", server.health),
        Route("/metrics", server.measure),
        *ollama.routes(server),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(Measured, metrics=server.metrics, paths=paths)]
    if hosts:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    handlers: Any = {HTTPException: _failed, PocketSlmError: _refused}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _page(_: Request) -> Response:
    text = PAGE.read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_RULES})


class Words(Protocol):
    """An interface's words for answers to one request."""

    media_type: str  # of a stream

    def whole(self) -> dict[str, Any]:
        """All of them."""
        ...

    def event(self, answer: Answer, records: Sequence[Record]) -> str:
        """A part of a stream: the tokens that came of an answer since the last part."""
        ...

    def finished(self, answer: Answer) -> str:
        """The part of a stream that says that an answer is whole."""
        ...

    def error(self, message: str) -> str:
        """The part that says that no more comes."""
        ...

    def end(self) -> str:
        """What a stream ends with, if anything."""
        ...


class Server:
    """What all routes share: the models, who may ask, and how an answer is made."""

    def __init__(self, models: Mapping[str, Model], limits: Limits, key: str | None) -> None:
        self.limits = limits
        self.key = key
        self.lines = {name: Line(model, limits) for name, model in models.items()}
        # The models by the names that clients ask for, each with an adapter or "".
        self.served = {
            f"{name}+{adapter}" if adapter else name: (line, adapter)
            for name, line in self.lines.items()
            for adapter in ("", *line.model.adapters)
        }
        self.metrics = Metrics()

    async def health(self, _: Request) -> Response:
        waiting = sum(line.waiting for line in self.lines.values())
        return JSONResponse({"status": "ok", "waiting": waiting})

    async def list_models(self, request: Request) -> Response:
        self.check_key(request)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "pocketslm"}
            for name in self.served
        ]
        return JSONResponse({"object": "list", "data": data})

    async def embedded(
        self, name: str, texts: list[str], *, truncate: bool = False
    ) -> tuple[str, Vector, int]:
        """The model's name, the embeddings of texts, and how many tokens they have."""
        line, name, _ = self.line(name)

        def work() -> tuple[Vector, int]:
            ids = line.model.tokens_to_embed(texts, truncate=truncate)
            return line.model.embed_tokens(ids), sum(map(len, ids))

        try:
            async with line.turn():
                vectors, count = await asyncio.get_running_loop().run_in_executor(None, work)
        except TimeoutError:
            raise HTTPException(504, TOO_LONG) from None
        return name, vectors, count

    async def embed(self, request: Request) -> Response:
        asked, texts, encoding = read_embeddings(await self.body(request))
        name, vectors, count = await self.embedded(asked, texts)
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
        return await self.answer(request, read_chat(await self.body(request)), OpenAI)

    async def complete(self, request: Request) -> Response:
        return await self.answer(request, read_completion(await self.body(request)), OpenAI)

    async def measure(self, request: Request) -> Response:
        self.check_key(request)
        waiting = {name: line.waiting for name, line in self.lines.items()}
        return Response(self.metrics.text(waiting), media_type=MEDIA_TYPE)

    async def answer(
        self, request: Request, asked: Asked, words: Callable[[list[Answer]], Words]
    ) -> Response:
        """What was asked for, in the words of an interface, whole or as a stream."""
        line, name, adapter = self.line(asked.model)
        answers = [
            Answer(line.model, asked, name, adapter, self.limits, n) for n in range(asked.count)
        ]
        told = words(answers)
        if asked.stream:
            events = self._events(line, answers, told)
            first = await anext(events)  # what is wrong with the request is said with its status
            return StreamingResponse(_chain(first, events), media_type=told.media_type)
        work = asyncio.ensure_future(self._whole(line, answers, told))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                return Response(status_code=499)
            return JSONResponse(work.result())
        finally:
            gone.cancel()

    async def _whole(self, line: Line, answers: list[Answer], told: Words) -> dict[str, Any]:
        try:
            async with aclosing(self._made(line, answers)) as made:
                async for _ in made:
                    pass
            return told.whole()
        except TimeoutError:
            raise HTTPException(504, TOO_LONG) from None

    async def _events(
        self, line: Line, answers: list[Answer], told: Words
    ) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(self._made(line, answers)) as made:
                async for answer, records in made:
                    if event := (
                        told.finished(answer) if records is None else told.event(answer, records)
                    ):
                        yield event
        except TimeoutError:
            yield told.error(TOO_LONG)
        if end := told.end():
            yield end

    async def _made(
        self, line: Line, answers: list[Answer]
    ) -> AsyncGenerator[tuple[Answer, list[Record] | None], None]:
        """Make answers: their records as they come, and None where an answer is whole."""
        async with line.turn() as until:
            for answer in answers:
                with self.metrics.making(answer):
                    if answer.has_tools:
                        answer.take(await line.reply(answer.with_tools, until))
                    else:
                        async with aclosing(line.records(answer.start, until)) as made:
                            async for records in made:
                                answer.add(records)
                                yield answer, records
                    yield answer, None

    def line(self, name: str) -> tuple[Line, str, str]:
        """Who answers for a model, its name, and the adapter that the answers take, or "".
        Raises HTTPException."""
        if not name and len(self.lines) == 1:
            name = next(iter(self.lines))
        if name not in self.served:
            raise HTTPException(
                404, f"there is no model {name!r}; there are: {', '.join(self.served)}"
            )
        line, adapter = self.served[name]
        return line, name, adapter

    def check_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    async def body(self, request: Request) -> dict[str, Any]:
        self.check_key(request)
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


class Answer:
    """One answer: how it starts, and what came of it. index: among those to one request, each of
    which draws by a seed of its own."""

    def __init__(
        self, model: Model, asked: Asked, name: str, adapter: str, limits: Limits, index: int = 0
    ) -> None:
        self.model, self.asked, self.name, self.index = model, asked, name, index
        self.texts: list[str] = []
        self.scores: list[dict[str, Any]] = []
        self.calls: Sequence[Call] = ()
        self.finish: Finish | None = None
        self.made = 0
        self.first_ns = self.last_ns = 0  # when its first and last token were made
        self.config = model.options(adapter=adapter, **asked.options)
        if index and self.config.seed is not None:
            self.config = self.config.but(seed=self.config.seed + index)
        most = min(self.config.max_new_tokens or limits.tokens, limits.tokens)
        self.ids: list[int] = []
        self.has_tools = bool(asked.tools) and asked.tool_choice != "none"
        if not self.has_tools:
            self.ids = (
                model.prompt_ids(
                    model.fitting(asked.messages, self.config) if asked.drop else asked.messages
                )
                if asked.messages is not None
                else model.tokenizer.encode(asked.prompt or "", add_special_tokens=True)
            )
            most = min(most, max(1, model.context - len(self.ids)))
        self.prompt_tokens = len(self.ids)
        self.config = self.config.but(max_new_tokens=most)

    def start(self) -> Iterator[Record | None]:
        return self.model.records(self.ids, self.config)

    def with_tools(self, model: TextModel) -> Reply:
        asked, config = self.asked, self.config.but(logprobs=False)
        return reply_with_tools(model, asked.messages or [], asked.tools, asked.tool_choice, config)

    def add(self, records: Sequence[Record]) -> None:
        self.texts += [record.text for record in records]
        self.finish = records[-1].finish
        self.made += len(records)
        self.first_ns, self.last_ns = self.first_ns or records[0].time_ns, records[-1].time_ns
        if self.config.logprobs:
            self.scores += map(self._score, records)

    def take(self, reply: Reply) -> None:
        """The same of a whole reply."""
        self.texts, self.calls, self.finish = [reply.text], reply.calls, reply.finish
        self.prompt_tokens, self.made = reply.prompt_tokens, len(reply.tokens)

    def _score(self, record: Record) -> dict[str, Any]:
        data = self.model.tokenizer.token_bytes(record.token)
        return {
            "token": data.decode("utf-8", "replace"),
            "bytes": list(data),
            "logprob": record.logprob,
            "top_logprobs": [],
        }


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _chain(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _said(request: Request, message: str, status: int) -> Response:
    """What is wrong, in the words of the interface that was asked."""
    if request.url.path.startswith(ollama.PREFIX):
        return JSONResponse({"error": message}, status)
    return JSONResponse(error_body(message, status), status)


def _failed(request: Request, error: HTTPException) -> Response:
    return _said(request, str(error.detail), error.status_code)


def _refused(request: Request, error: PocketSlmError) -> Response:
    return _said(request, str(error), 400)
