"""The events of a task: pieces of text while it runs, and an `Answer` at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["summarize", "ask", "suggest", "rewrite"]
# The finish of a generation, or "cancelled", or "interrupted" by the end of the program, or "none"
# if the model was not asked.
Finish = Literal["eos", "stop", "length", "context", "cancelled", "interrupted", "none"]


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that supports an answer: the characters from ``start`` to ``end`` of the document's
    text, in its chunk number ``chunk``. ``document`` is the document's number in the library.
    """

    chunk: int
    start: int
    end: int
    document: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a task.

    - ``request``: the question or instruction.
    - ``text``: all text that was yielded.
    - ``own``: the part of ``text`` in the model's words, empty if none of them was supported. The
      rest are quotes.
    - ``asked``: the question as it was understood: with words of the question before it, if it goes
      on from that one.
    - ``found``: whether the document holds what was asked for.
    - ``by_meaning``: whether the search went by meaning as well as by words.
    - ``items``: the questions of "suggest".
    - ``prompt_tokens``, ``new_tokens``, ``ttft_ms`` (time to first token), ``decode_tps``: measured
      on the last generation.
    - ``seconds``: the time of the whole task.
    """

    task: Task
    request: str
    text: str
    finish: Finish
    asked: str = ""
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
