"""Answers in OpenAI's words."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pocketslm.runtime.server.requests import FINISH, to_json

if TYPE_CHECKING:
    from pocketslm.runtime.model import Record
    from pocketslm.runtime.server.app import Answer


class OpenAI:
    """Answers to one request: each is a choice; a stream is lines of ``data:``."""

    media_type = "text/event-stream"

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        asked = answers[0].asked
        self._usage, self._chat = asked.usage, asked.messages is not None
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, [self._choice(answer) for answer in self._answers]) | self._used()

    def event(self, answer: Answer, records: Sequence[Record]) -> str:
        text = "".join(record.text for record in records)
        first, scores = answer.made == len(records), answer.scores[-len(records) :]
        if not (text or first or scores):
            return ""
        role = {"role": "assistant"} if first else {}
        return self._chunk(answer, {**role, "content": text}, scores)

    def finished(self, answer: Answer) -> str:
        made = self._chunk(answer, self._message(answer, indexed=True)) if answer.has_tools else ""
        return made + self._chunk(answer, {}, (), _finish(answer))

    def error(self, message: str) -> str:
        return _line(error_body(message, 504))

    def end(self) -> str:
        used = _line(self._body(self._kind, []) | self._used()) if self._usage else ""
        return f"{used}data: [DONE]\n\n"

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _choice(self, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": _finish(answer)}
        if not self._chat:
            return {**choice, "text": "".join(answer.texts), "logprobs": None}
        scores = {"content": answer.scores} if answer.scores else None
        return {**choice, "message": self._message(answer), "logprobs": scores}

    def _message(self, answer: Answer, *, indexed: bool = False) -> dict[str, Any]:
        text = "".join(answer.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if not answer.has_tools:
            return message
        calls = [
            {
                **({"index": at} if indexed else {}),
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for at, call in enumerate(answer.calls)
        ]
        return message | {"content": text or None} | ({"tool_calls": calls} if calls else {})

    def _chunk(
        self,
        answer: Answer,
        delta: dict[str, Any],
        scores: Sequence[dict[str, Any]] = (),
        finish: str | None = None,
    ) -> str:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": finish, "logprobs": None}
        if self._chat:
            choice["delta"] = delta
            if scores:
                choice["logprobs"] = {"content": scores}
        else:
            choice["text"] = delta.get("content", "")
        return _line(self._body(self._kind, [choice]))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._answers[0].name,
            "choices": choices,
        }

    def _used(self) -> dict[str, Any]:
        """The prompt counts once, however many answers it has."""
        prompt = self._answers[0].prompt_tokens
        made = sum(answer.made for answer in self._answers)
        usage = {"prompt_tokens": prompt, "completion_tokens": made}
        return {"usage": usage | {"total_tokens": prompt + made}}


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.calls else FINISH[answer.finish]


def _line(body: dict[str, Any]) -> str:
    return f"data: {to_json(body)}\n\n"


def error_body(message: str, status: int) -> dict[str, Any]:
    """What is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
