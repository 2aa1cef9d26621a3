"""What a task yields: pieces of text while it runs, and at its end an `Answer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["summarize", "ask", "suggest", "rewrite"]
# As a generation's, or "cancelled", or "interrupted" by the end of the program, or "none" where the
# model was not asked.
Finish = Literal["eos", "stop", "length", "context", "cancelled", "interrupted", "none"]


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer rests on: characters start to end of the document's text, which lie
    in its chunk number ``chunk``; ``document`` is its number in the library."""

    chunk: int
    start: int
    end: int
    document: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a task.

    request: the question or instruction. text: all that was yielded. own: the part of it in the
    model's words, "" where none of them was supported; the rest are quotes. found: whether the
    document holds what was asked for. by_meaning: whether it was searched by meaning as well as by
    words. items: the questions of "suggest". prompt_tokens, new_tokens, ttft_ms (time to first
    token) and decode_tps are those of the last generation, ``seconds`` of the whole task.
    """

    task: Task
    request: str
    text: str
    finish: Finish
    found: bool = True
    own: str = ""
    by_meaning: bool = False
    items: tuple[str, ...] = ()
    citations: tuple[Citation, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_ms: float = 0.0
    decode_tps: float | None = None
    seconds: float = 0.0


# What a task's generator yields; exactly one Answer, as the last.
Event = str | Answer
