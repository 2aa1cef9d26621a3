"""Token ids to text, one id at a time."""

from __future__ import annotations

import codecs
from typing import Protocol


class ByteSource(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that are skipped in decoded text."""

    @property
    def leading_strip(self) -> tuple[str, int]:
        """A character, and how often it is taken off the start of a text."""

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes that a token stands for, inside a text or at its start."""


class StreamDecoder:
    """Text pieces of a growing sequence of ids: `push` each id, `flush` at the end.

    The pieces joined are `tokenizer.decode` of all ids. A piece never ends inside a character;
    the bytes of an unfinished one wait for the next token. Each token costs constant time.
    """

    def __init__(self, tokenizer: ByteSource, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waits = False  # whether the decoder holds a part of a character
        self._start()

    def _start(self) -> None:
        self._first = True
        self._strip, self._strip_left = self._tokenizer.leading_strip

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty."""
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = False
        if data.isascii() and not self._waits:
            text = data.decode("ascii")
        else:
            text = self._utf8.decode(data)
            self._waits = bool(self._utf8.getstate()[0])
        return self._stripped(text) if self._strip_left else text

    def flush(self) -> str:
        """The rest, with U+FFFD for an unfinished character; the decoder then starts anew."""
        rest = self._stripped(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._waits = False
        self._start()
        return rest

    def _stripped(self, text: str) -> str:
        while text and self._strip_left:
            if not text.startswith(self._strip):
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
