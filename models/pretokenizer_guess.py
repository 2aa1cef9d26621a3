"""The pre-tokenizer of a byte-level vocabulary, told from its tokens.

No merge crosses the border of a word, so a vocabulary that was trained on enough text shows how its
words were cut: a token `123` says that numbers were kept together up to three digits, `(get` that a
letter may follow a sign, `toString` that a word may change case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ENOUGH = 5_000
"""Tokens below which a kind that is missing says nothing."""

_NUMBER = re.compile(r" ?[0-9]+")
_SIGN_AND_LETTERS = re.compile(r"[(.\"_/-][A-Za-z]{2,}")
_QUOTE_AND_LETTERS = re.compile(r"âĢľ[A-Za-z]{2,}")  # the quotation mark “
_CAMEL = re.compile(r" ?[a-z]{2,}[A-Z][a-z]+")


def guess_pretokenizer(tokens: Iterable[str]) -> str | None:
    """A name of `tokenizer.ggml.pre`; None where the tokens do not tell.

    tokens: the ordinary ones, as the byte alphabet writes them.
    """
    texts = [token.replace("Ġ", " ") for token in tokens]
    numbers = [text for text in texts if _NUMBER.fullmatch(text)]
    digits = max((len(text.strip()) for text in numbers), default=0)
    if len(texts) < ENOUGH or digits == 0:
        return None
    if not any(map(_SIGN_AND_LETTERS.fullmatch, texts)):
        if any(text[0] == " " and len(text) > 1 for text in numbers):
            return "gpt-2"
        return "smollm" if digits == 1 else None
    camel = any(map(_CAMEL.fullmatch, texts))
    if digits == 1:
        return "qwen2" if camel else "tekken"
    if digits == 3:
        if not any(map(_QUOTE_AND_LETTERS.fullmatch, texts)):  # only signs of ASCII lead words
            return "deepseek-v3"
        return "llama-bpe" if camel else "gpt-4o"
    return None
