"""What OpenAI's requests ask for, as options of a GenerationConfig."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.runtime.answer import Finish

# Why an answer ended, in OpenAI's words and Ollama's.
FINISH: dict[Finish | None, str] = {"eos": "stop", "stop": "stop", None: "stop"}
FINISH |= {"length": "length", "context": "length"}
to_json = json.JSONEncoder(ensure_ascii=False).encode  # one encoder, as each token needs it
MOST_STOPS = 4
MOST_ANSWERS = 8
# Fields that change nothing here, and may have any value.
UNUSED = {"user", "store", "metadata", "safety_identifier", "prompt_cache_key"}
# Fields that may have only the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "echo": (False,),
    "suffix": (),
}


@dataclass(frozen=True)
class Asked:
    """A request, read: messages, or a prompt that is a text to continue."""

    model: str
    messages: list[dict[str, Any]] | None
    prompt: str | None
    options: dict[str, Any]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    stream: bool = False
    usage: bool = False  # also at the end of a stream
    count: int = 1  # of answers
    drop: bool = False  # the oldest turns, where they do not fit


class Fields:
    """A body whose fields are taken by type; what nobody takes is refused by name."""

    def __init__(
        self,
        body: Mapping[str, Any],
        unused: Collection[str],
        neutral: Mapping[str, tuple[Any, ...]],
    ) -> None:
        self._unused, self._neutral = unused, neutral
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | tuple[type, ...], otherwise: Any = None) -> Any:
        value = self._left.pop(name, otherwise)
        wrong = value is not None and not isinstance(value, kind)
        if wrong or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{name!r} is of the wrong type")
        return value

    def finish(self) -> None:
        for name, value in self._left.items():
            values = self._neutral.get(name, ())
            if name in self._unused or value in values:
                continue
            what = f" other than {values[0]!r}" if values else ""
            raise UsageError(f"{name!r}{what} is not supported")


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A body of ``/v1/chat/completions``. Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    messages = fields.take("messages", list)
    if not messages:
        raise UsageError("'messages' must be a list with a message")
    tools = fields.take("tools", list, [])
    choice = fields.take("tool_choice", (str, dict), "auto")
    if isinstance(choice, dict):
        choice = _member(choice, "function", "name")
    options, common = _common(fields)
    options |= _format(fields.take("response_format", dict))
    logprobs = fields.take("logprobs", bool, False)
    fields.finish()
    texts = [read_message(message) for message in messages]
    options |= {"logprobs": logprobs}
    return Asked(
        messages=texts,
        prompt=None,
        options=options,
        tools=tools,
        tool_choice=choice,
        **common,
    )


def read_completion(body: Mapping[str, Any]) -> Asked:
    """A body of ``/v1/completions``. Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    prompt = fields.take("prompt", (str, list))
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise UsageError("'prompt' must be one text")
    options, common = _common(fields)
    fields.finish()
    return Asked(messages=None, prompt=prompt, options=options, **common)


def read_embeddings(body: Mapping[str, Any]) -> tuple[str, list[str], str]:
    """A body of ``/v1/embeddings``: the model, the texts and their encoding. Raises UsageError."""
    fields = Fields(body, UNUSED, NEUTRAL)
    model = fields.take("model", str, "")
    texts = read_texts(fields.take("input", (str, list)))
    encoding = fields.take("encoding_format", str, "float")
    fields.finish()
    if encoding not in ("float", "base64"):
        raise UsageError("'encoding_format' must be float or base64")
    return model, texts, encoding


def read_texts(given: str | list[Any] | None) -> list[str]:
    """What is to be embedded. Raises UsageError."""
    texts = [given] if isinstance(given, str) else given
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UsageError("'input' must be a text or texts")
    return texts


def _common(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    stop = fields.take("stop", (str, list), [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MOST_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise UsageError(f"'stop' must be a text, or up to {MOST_STOPS}")
    shown = fields.take("stream_options", dict, {})
    limit = fields.take("max_completion_tokens", int)
    limit = fields.take("max_tokens", int) if limit is None else limit
    options = {
        "max_new_tokens": limit,
        "temperature": fields.take("temperature", (int, float)),
        "top_p": fields.take("top_p", (int, float)),
        # These are no options of OpenAI's; vLLM and llama.cpp have them by these names.
        "top_k": fields.take("top_k", int),
        "min_p": fields.take("min_p", (int, float)),
        "typical_p": fields.take("typical_p", (int, float)),
        "repetition_penalty": fields.take("repetition_penalty", (int, float)),
        "seed": fields.take("seed", int),
        "stop": stops or None,
    }
    count = fields.take("n", int, 1)
    if not 1 <= count <= MOST_ANSWERS:
        raise UsageError(f"'n' is {count}, expected 1 to {MOST_ANSWERS}")
    common = {
        "count": count,
        "model": fields.take("model", str, ""),
        "stream": fields.take("stream", bool, False),
        "usage": shown.get("include_usage") is True,
    }
    return options, common


def _format(asked: dict[str, Any] | None) -> dict[str, Any]:
    kind = asked.get("type") if asked else "text"
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema" and asked:
        schema = _member(asked, "json_schema", "schema")
        return {"json_schema": schema}
    raise UsageError("'response_format' must have the type text, json_object or json_schema")


def _member(value: dict[str, Any], *names: str) -> Any:
    inside: Any = value
    for name in names:
        inside = inside.get(name) if isinstance(inside, dict) else None
    if inside is None:
        raise UsageError(f"{'.'.join(names)!r} is missing")
    return inside


def read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError("each of 'messages' must have a role")
    out = {name: value for name, value in message.items() if value is not None}
    content = out.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise UsageError("a part of a message other than text is not supported")
        texts = [part.get("text", "") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise UsageError("the 'content' of a message must be a text, or parts of one")
    out["content"] = content
    if out["role"] == "developer":
        out["role"] = "system"
    calls = out.get("tool_calls", [])
    if not isinstance(calls, list):
        raise UsageError("'tool_calls' of a message must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:  # templates want the value
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                raise UsageError("the arguments of a call in 'messages' are no JSON") from None
    return out
