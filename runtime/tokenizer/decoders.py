"""The decoders of `tokenizer.json`: which bytes a token stands for.

Every supported decoder is a function of one token, apart from what it does at the very start of
a text, so decoding is concatenating bytes and streaming needs no look-back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.pretokenizers import byte_alphabet, metaspace_scheme

KNOWN = (
    "ByteLevel",
    "Metaspace",
    "WordPiece",
    "Sequence of Replace, ByteFallback, Fuse, Strip in this order",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Decoder:
    """What a token stands for: `inner` anywhere, `first` when it starts the text.

    Up to `strip_count` times `strip` is taken off the start of the decoded text. `unspaced`: the
    first token is without its spaces, and else what it is inside.
    """

    inner: Callable[[str], bytes]
    first: Callable[[str], bytes]
    strip: str = " "
    strip_count: int = 0
    unspaced: bool = False


def byte_token(token: str) -> bytes | None:
    """The byte that a `<0xAB>` token stands for; None for other tokens."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match.group(1), 16)]) if match else None


def build(node: object) -> Decoder:
    """The decoder that `tokenizer.json`'s `decoder` describes."""
    parts = fields.components(node, "decoder", "decoders")
    kinds = [str(part["type"]) for part in parts]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    if kinds == ["WordPiece"]:
        return _word_piece(parts[0])
    if kinds == ["Metaspace"]:
        mark, scheme = metaspace_scheme(parts[0], "decoder")

        def inner(token: str) -> bytes:
            return token.replace(mark, " ").encode()

        def first(token: str) -> bytes:
            return token.replace(mark, "").encode()

        never = scheme == "never"
        return Decoder(inner, inner if never else first, unspaced=not never)
    if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse )?(Strip )?", " ".join([*kinds, ""])):
        raise fields.unsupported("decoder", kinds, KNOWN)
    if not parts:
        raise TokenizerError(
            f"tokenizer.json: decoder is missing; expected one of {', '.join(KNOWN)}; "
            "fetch or export the file again"
        )
    return _sentence_piece(parts)


# What `cleanup` writes for what, in this order.
_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _word_piece(node: dict[str, object]) -> Decoder:
    prefix = fields.field(node, "prefix", str, "decoder")
    cleanup = _CLEANUP if fields.optional(node, "cleanup", bool, True, "decoder") else ()

    def first(token: str) -> bytes:
        for old, new in cleanup:
            token = token.replace(old, new)
        return token.encode()

    def inner(token: str) -> bytes:
        return first(token.removeprefix(prefix) if token.startswith(prefix) else " " + token)

    return Decoder(inner, first)


def _byte_level() -> Decoder:
    table = {chr(code): byte for byte, code in byte_alphabet().items()}

    def decode(token: str) -> bytes:
        try:
            return bytes([table[char] for char in token])
        except KeyError:  # an added token, which is text and not bytes in disguise
            return token.encode()

    return Decoder(decode, decode)


def _sentence_piece(parts: list[dict[str, object]]) -> Decoder:
    replacements: list[tuple[str, str]] = []
    fallback = fused = False
    strip, strip_count = " ", 0
    for part in parts:
        if part["type"] == "Replace":
            found = fields.field(part, "pattern", dict, "decoder")
            old = fields.field(found, "String", str, "decoder.pattern")
            replacements.append((old, fields.field(part, "content", str, "decoder")))
        elif part["type"] == "Strip":
            strip = fields.field(part, "content", str, "decoder")
            strip_count = fields.field(part, "start", int, "decoder")
            if not fused or len(strip) != 1 or part.get("stop") != 0 or strip_count < 0:
                raise fields.unsupported(
                    "decoder Strip", part, ["one character at the start of the text, after Fuse"]
                )
        fallback |= part["type"] == "ByteFallback"
        fused |= part["type"] == "Fuse"

    def decode(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        return (byte_token(token) if fallback else None) or token.encode()

    return Decoder(decode, decode, strip, strip_count)
