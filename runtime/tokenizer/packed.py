"""A tokenizer whose words and merges lie packed in the model file.

Of `tokenizer.json` only what stands before its model is read then: added tokens, decoder and
post-processor. The rest, most of a large file, is read when somebody asks for the text of an
ordinary token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

from pocketslm.runtime.tokenizer import decoders
from pocketslm.runtime.tokenizer.decoders import Decoder
from pocketslm.runtime.tokenizer.identity import with_added_tokens
from pocketslm.runtime.tokenizer.vocabulary import AddedToken, Cutter, added_tokens

_BEFORE_MODEL = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


class PackedTokenizer(Protocol):
    """An `Encoder` that also knows the bytes of its tokens.

    size: one more than the largest id. takes_normalized: it encodes only what lies between added
    tokens, normalized.
    """

    name: str
    size: int
    takes_normalized: bool

    def encode(
        self, text: str, *, parse_special: bool, at_start: bool = True, normalized: bool = False
    ) -> list[int]:
        """The ids of `text`; `at_start` says that nothing stands before it."""

    def piece(self, id_: int) -> bytes:
        """The bytes of an ordinary token; empty for an id that is not used."""


class NormalizingEncoder:
    """An `Encoder` over a packed tokenizer that takes normalized text."""

    def __init__(self, packed: PackedTokenizer, cutter: Cutter) -> None:
        self.name = packed.name
        self._packed, self._cutter = packed, cutter

    def encode(self, text: str, *, parse_special: bool, at_start: bool = True) -> list[int]:
        """The ids of `text`; `at_start` says that nothing stands before it."""
        out: list[int] = []
        for part, id_, starts in self._cutter.cut(text, parse_special, at_start):
            if id_ is not None:
                out.append(id_)
            else:
                out += self._packed.encode(
                    part, parse_special=parse_special, at_start=starts, normalized=True
                )
        return out


def read_head(
    text: str, config: Mapping[str, object], special_map: Mapping[str, object]
) -> dict[str, Any] | None:
    """`tokenizer.json` without its model; None where all of it must be read.

    That is so where the model is not its last part, where the other files add tokens to it, or
    where a token stands for other bytes at the start of a text.
    """
    head = _without_model(text)
    if head is None:
        return None
    without_words = head | {"model": {}}
    if with_added_tokens(without_words, config, special_map) != without_words:
        return None
    decoder = decoders.build(head["decoder"])
    return head if decoder.unspaced or decoder.inner is decoder.first else None


def _without_model(text: str) -> dict[str, Any] | None:
    """The fields before the model, each read once; None for another form of file."""
    read, head = json.JSONDecoder().raw_decode, dict[str, Any]()
    try:
        at = _after(text, 0, "{")
        while True:
            name, at = read(text, at)
            at = _after(text, at, ":")
            if name == "model":
                return head if all(part in head for part in _BEFORE_MODEL) else None
            head[name], at = read(text, at)
            at = _after(text, at, ",")
    except (ValueError, RecursionError):
        return None


def _after(text: str, at: int, sign: str) -> int:
    """Where the next value begins, past white space and a sign. ValueError for another sign."""
    found = re.compile(rf"[ \t\r\n]*{sign}[ \t\r\n]*").match(text, at)
    if found is None:
        raise ValueError(f"expected {sign} at {at}")
    return found.end()


class PackedVocabulary:
    """The `Vocabulary` of a packed tokenizer: ids, and texts of added tokens.

    read: gives the texts of all tokens, once they are needed.
    """

    def __init__(
        self,
        head: Mapping[str, object],
        packed: PackedTokenizer,
        read: Callable[[], Mapping[int, str]],
    ) -> None:
        self.added: list[AddedToken] = list(added_tokens(head))
        self.special_ids = frozenset(token.id for token in self.added if token.special)
        self.size = packed.size
        self._added_texts = {token.id: token.content for token in self.added}
        self._packed, self._read = packed, read

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """The text of every token."""
        return self._read()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: id_ for id_, text in self.texts.items()}

    def id_of(self, text: str) -> int | None:
        """See `Vocabulary.id_of`."""
        for token in self.added:
            if token.content == text:
                return token.id
        return self._ids.get(text)

    def text_of(self, id_: int) -> str | None:
        """See `Vocabulary.text_of`."""
        return self._added_texts.get(id_) or self.texts.get(id_)

    def bytes_of(self, id_: int, decoder: Decoder, *, first: bool) -> bytes | None:
        """See `Vocabulary.bytes_of`."""
        text = self._added_texts.get(id_)
        if text is not None:
            return (decoder.first if first else decoder.inner)(text)
        data = self._packed.piece(id_)
        if not data:
            return None
        return data.replace(b" ", b"") if first and decoder.unspaced else data
