"""Ollama's interface over the same models: chats, texts, embeddings, and what there is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pocketslm import __version__
from pocketslm.errors import UsageError
from pocketslm.runtime.server.requests import (
    FINISH,
    Asked,
    Fields,
    read_message,
    read_texts,
    to_json,
)

if TYPE_CHECKING:
    from pocketslm.runtime.model import Model, Record
    from pocketslm.runtime.server.app import Answer, Server

PREFIX = "/api/"
LATEST = ":latest"  # which their names may end with
# Fields that change nothing here: a model stays loaded, and images and thoughts are none.
UNUSED = {"keep_alive"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "images": ([],),
    "think": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "verbose": (False, True),
    "options": ({},),
}
# Ollama's name of an option: ours, and its type.
OPTIONS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "temperature": ("temperature", (int, float)),
    "top_p": ("top_p", (int, float)),
    "top_k": ("top_k", int),
    "min_p": ("min_p", (int, float)),
    "typical_p": ("typical_p", (int, float)),
    "seed": ("seed", int),
    "repeat_penalty": ("repetition_penalty", (int, float)),
}


def routes(server: Server) -> list[Route]:
    """The routes of a server."""

    async def chat(request: Request) -> Response:
        return await _answer(server, request, read_chat(await server.body(request)), chat=True)

    async def generate(request: Request) -> Response:
        return await _answer(server, request, read_generate(await server.body(request)), chat=False)

    async def embed(request: Request) -> Response:
        start = time.perf_counter_ns()
        asked, texts, truncate = read_embed(await server.body(request))
        name, vectors, count = await server.embedded(asked, texts, truncate=truncate)
        took = {"total_duration": time.perf_counter_ns() - start, "load_duration": 0}
        made = {"model": name, "embeddings": vectors.tolist(), "prompt_eval_count": count}
        return JSONResponse(made | took)

    async def tags(request: Request) -> Response:
        server.check_key(request)
        models = [_listed(name, line.model) for name, (line, _) in server.served.items()]
        return JSONResponse({"models": models})

    async def show(request: Request) -> Response:
        fields = Fields(await server.body(request), UNUSED, NEUTRAL)
        name = _model(fields)
        fields.finish()
        line, _, _ = server.line(name)
        return JSONResponse(_shown(line.model))

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__})

    return [
        Route(f"{PREFIX}chat", chat, methods=["POST"]),
        Route(f"{PREFIX}generate", generate, methods=["POST"]),
        Route(f"{PREFIX}embed", embed, methods=["POST"]),
        Route(f"{PREFIX}show", show, methods=["POST"]),
        Route(f"{PREFIX}tags", tags),
        Route(f"{PREFIX}version", version),
    ]


async def _answer(server: Server, request: Request, asked: Asked, *, chat: bool) -> Response:
    if asked.messages == [] or (asked.messages is None and not asked.prompt):
        _, name, _ = server.line(asked.model)  # "load it", which it is
        nothing = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
        return JSONResponse(_stamp(name) | nothing | {"done": True, "done_reason": "load"})
    return await server.answer(request, asked, lambda answers: _Words(answers[0], chat=chat))


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A body of ``/api/chat``, whose oldest turns go where the context is full, unless it says
    otherwise. Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    messages = [_message(message) for message in fields.take("messages", list, [])]
    tools = fields.take("tools", list, [])
    drop = fields.take("truncate", bool, True)
    options, common = _common(fields)
    return Asked(messages=messages, prompt=None, options=options, tools=tools, drop=drop, **common)


def read_generate(body: Mapping[str, Any]) -> Asked:
    """A body of ``/api/generate``; ``raw`` continues the text as it is. Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    prompt = fields.take("prompt", str, "")
    system = fields.take("system", str, "")
    raw = fields.take("raw", bool, False)
    options, common = _common(fields)
    if raw and system:
        raise UsageError("'system' does nothing with 'raw'; leave it out")
    if raw:
        return Asked(messages=None, prompt=prompt, options=options, **common)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}] if prompt else []
    return Asked(messages=messages if prompt else [], prompt=None, options=options, **common)


def read_embed(body: Mapping[str, Any]) -> tuple[str, list[str], bool]:
    """A body of ``/api/embed``: the model, the texts, and whether those that are too long are cut.
    Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    name, texts = _model(fields), read_texts(fields.take("input", (str, list)))
    truncate = fields.take("truncate", bool, True)
    fields.finish()
    return name, texts, truncate


def _common(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    given = Fields(fields.take("options", dict, {}), set(), {})
    options = {ours: given.take(name, kind) for name, (ours, kind) in OPTIONS.items()}
    most = given.take("num_predict", int)
    options["max_new_tokens"] = None if most in (-1, -2) else most  # as many as there is room for
    stop = given.take("stop", (str, list), [])
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stops):
        raise UsageError("'stop' must be a text or texts")
    options["stop"] = stops or None
    given.finish()
    form = fields.take("format", (str, dict))
    if form == "json":
        options["json_schema"] = {"type": "object"}
    elif isinstance(form, dict):
        options["json_schema"] = form
    elif form:
        raise UsageError(f"'format' is {form!r}, expected \"json\" or a JSON schema")
    common = {"model": _model(fields), "stream": fields.take("stream", bool, True)}
    fields.finish()
    return options, common


def _model(fields: Fields) -> str:
    name: str = fields.take("model", str, "")
    return name.removesuffix(LATEST)


def _message(message: Any) -> dict[str, Any]:
    read = read_message(message)
    if read.pop("images", []):
        raise UsageError("'images' of a message are not supported")
    return read


class _Words:
    """An answer in Ollama's words: an object a line, or one object."""

    media_type = "application/x-ndjson"

    def __init__(self, answer: Answer, *, chat: bool) -> None:
        self._answer, self._chat = answer, chat
        self._start = time.perf_counter_ns()

    def whole(self) -> dict[str, Any]:
        return self._said("".join(self._answer.texts)) | self._done()

    def event(self, answer: Answer, records: Sequence[Record]) -> str:
        text = "".join(record.text for record in records)
        return _line(self._said(text) | {"done": False}) if text else ""

    def finished(self, answer: Answer) -> str:
        made = ""
        if answer.has_tools:
            made = _line(self._said("".join(answer.texts)) | {"done": False})
            answer.calls = ()  # they are said once
        return made + _line(self._said("") | self._done())

    def error(self, message: str) -> str:
        return _line({"error": message})

    def end(self) -> str:
        return ""

    def _said(self, text: str) -> dict[str, Any]:
        stamp = _stamp(self._answer.name)
        if not self._chat:
            return stamp | {"response": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._answer.calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.arguments}}
                for call in self._answer.calls
            ]
        return stamp | {"message": message}

    def _done(self) -> dict[str, Any]:
        answer = self._answer
        return {
            "done": True,
            "done_reason": FINISH[answer.finish],
            "total_duration": time.perf_counter_ns() - self._start,
            "load_duration": 0,
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": answer.first_ns,
            "eval_count": answer.made,
            "eval_duration": answer.last_ns - answer.first_ns,
        }


def _line(value: dict[str, Any]) -> str:
    return to_json(value) + "\n"


def _stamp(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _details(model: Model) -> dict[str, Any]:
    manifest = model.bundle.manifest
    if manifest is None:
        return {"format": "pocketslm", "family": "", "families": []}
    family = str(manifest.architecture.get("architecture", ""))
    return {
        "parent_model": str(manifest.source.get("name", "")),
        "format": "pocketslm",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": max(manifest.weights, key=manifest.weights.__getitem__, default=""),
    }


def _listed(name: str, model: Model) -> dict[str, Any]:
    manifest = model.bundle.manifest
    path = model.bundle.path
    changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
    return {
        "name": name,
        "model": name,
        "modified_at": changed,
        "size": manifest.size_bytes if manifest else 0,
        "digest": _digest(model),
        "details": _details(model),
    }


def _digest(model: Model) -> str:
    manifest, graph = model.bundle.manifest, model.bundle.graphs[0]
    return manifest.files[graph.file].sha256 if manifest else ""


def _shown(model: Model) -> dict[str, Any]:
    manifest, config, template = model.bundle.manifest, model.bundle.config, ""
    if model.tokenizer.chat_template is not None:
        template = str(model.tokenizer.chat_template)
    generates = model.bundle.generates
    info: dict[str, Any] = {"general.basename": model.name}
    if config is not None:
        family = config.architecture
        info |= {
            "general.architecture": family,
            f"{family}.context_length": model.context,
            f"{family}.embedding_length": config.hidden_size,
            f"{family}.block_count": config.num_hidden_layers,
            f"{family}.vocab_size": config.vocab_size,
        }
    tools = ["tools"] if "tools" in template else []
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "license": str(manifest.source.get("licence", "")) if manifest else "",
        "details": _details(model),
        "model_info": info,
        "capabilities": ["completion", *tools] if generates else ["embedding"],
    }
