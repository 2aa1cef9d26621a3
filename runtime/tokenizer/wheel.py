"""The encoder of the `tokenizers` wheel behind the same interface as the pure Python one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.vocabulary import Vocabulary

MAX_REASON = 300  # characters of the wheel's own error


def is_installed() -> bool:
    """Whether the `tokenizers` wheel can be imported here."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return True


class WheelEncoder:
    """Text to ids with Hugging Face's `tokenizers`.

    Special tokens in ordinary text are kept from matching by a second tokenizer over the same
    model with `encode_special_tokens` set. A Unigram finds them all the same, since they are
    pieces of it; such a text is encoded anew over a copy of the model without these pieces.
    Texts that continue another one have tokenizers of their own where `Metaspace` has
    `prepend_scheme: first`. All but the first two are made on first use.
    """

    name = "tokenizers"

    def __init__(self, text: str, document: Mapping[str, object], vocabulary: Vocabulary) -> None:
        """`text` is the whole of `tokenizer.json`, `document` what it parses to."""
        _check_prefix(vocabulary.model)
        self._document = document
        self._pretokenizers = fields.components(
            document.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers"
        )
        self._added = {token.id: token.content for token in vocabulary.added}
        self._model = vocabulary.model
        self._special_pieces = {
            token.id: token.content
            for token in vocabulary.added
            if self._model.get("type") == "Unigram"
            and token.special
            and token.content in vocabulary.ids
        }
        self._special = _load(text)
        self._special.no_truncation()
        self._special.no_padding()
        self._ordinary = self._sibling(document.get("pre_tokenizer"))

    def _sibling(self, pre_tokenizer: object, model: Any = None) -> Any:
        """A tokenizer on the same model (shared, not copied) that takes special text as text.

        model: what encodes in its place.
        """
        shell = _load(
            json.dumps(
                {
                    "version": "1.0",
                    "added_tokens": [],
                    "normalizer": self._document.get("normalizer"),
                    "pre_tokenizer": pre_tokenizer,
                    "model": {"type": "BPE", "vocab": {}, "merges": []},
                }
            )
        )
        shell.model = self._special.model
        added = self._special.get_added_tokens_decoder()
        shell.add_tokens([added[id_] for id_ in self._added if id_ in added])
        for known in (added, shell.get_added_tokens_decoder()):
            if {id_: token.content for id_, token in known.items()} != self._added:
                raise TokenizerError(
                    "tokenizer.json: the tokenizers wheel numbers the added tokens differently "
                    "from the file; expected the same ids; use implementation='python'"
                )
        shell.encode_special_tokens = True
        if model is not None:
            shell.model = model
        return shell

    @cached_property
    def _continuing(self) -> Any:
        return self._sibling(self._without_first) if self._without_first else self._ordinary

    @cached_property
    def _without_first(self) -> object:
        """The pre-tokenizer that puts no mark before a text; None if the file's puts none."""
        parts = self._pretokenizers
        if not any(part.get("prepend_scheme") == "first" for part in parts):
            return None
        changed = [
            {**part, "prepend_scheme": "never", "add_prefix_space": False}
            if part.get("prepend_scheme") == "first"
            else part
            for part in parts
        ]
        return {"type": "Sequence", "pretokenizers": changed}

    @cached_property
    def _without_special(self) -> tuple[Any, Any]:
        """`_ordinary` and `_continuing` over a model that lacks the pieces of special tokens."""
        from tokenizers.models import Unigram

        special = set(self._special_pieces.values())
        vocab = fields.field(self._model, "vocab", list, "model")
        pieces = [("" if piece in special else piece, score) for piece, score in vocab]
        unknown = fields.field(self._model, "unk_id", int, "model")
        fallback = fields.optional(self._model, "byte_fallback", bool, False, "model")
        model = _guarded(lambda: Unigram(pieces, unknown, fallback))
        start = self._document.get("pre_tokenizer")
        return tuple(self._sibling(node, model) for node in (start, self._without_first or start))

    def _finds_special(self, encoded: Any) -> bool:
        """Whether a Unigram has found pieces of special tokens in an ordinary text."""
        special = self._special_pieces
        if special and self._model.get("byte_fallback"):
            return True  # they may have become bytes, together with an unknown neighbour
        if special.keys().isdisjoint(encoded.ids):
            return False
        # The unknown token's text is what it stands for.
        return any(
            id_ in special and special[id_] in text
            for id_, text in zip(encoded.ids, encoded.tokens, strict=True)
        )

    def encode(self, text: str, *, parse_special: bool, at_start: bool = True) -> list[int]:
        """The ids of `text`; `at_start` says that nothing stands before it."""
        if parse_special:
            if not at_start:
                raise AssertionError("text with special tokens is always encoded whole")
            encoder = self._special
        else:
            encoder = self._ordinary if at_start else self._continuing
        encoded = _encoded(encoder, text)
        if not parse_special and self._finds_special(encoded):
            encoded = _encoded(self._without_special[not at_start], text)
        ids: list[int] = encoded.ids
        return ids


def _encoded(encoder: Any, text: str) -> Any:
    return _guarded(lambda: encoder.encode(text, add_special_tokens=False))


def _check_prefix(model: Mapping[str, object]) -> None:
    """Refuses merges on which the wheel would panic, which it reports on stderr by itself."""
    prefix = fields.optional(model, "continuing_subword_prefix", str, "", "model")
    for merge in fields.optional(model, "merges", list, [], "model") if prefix else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        right = pair[1] if isinstance(pair, list) and len(pair) == 2 else None
        if not isinstance(right, str) or not right.startswith(prefix):
            raise TokenizerError(
                f"tokenizer.json: model.merges has {str(merge)[:80]!r}; expected two tokens of "
                f"which the second begins with {prefix[:80]!r}, the model's "
                "continuing_subword_prefix; fetch or export the file again"
            )


def _load(text: str) -> Any:
    from tokenizers import Tokenizer

    return _guarded(lambda: Tokenizer.from_str(text))


def _guarded(call: Callable[[], Any]) -> Any:
    """`call()`; the wheel's exceptions, panics included, become `TokenizerError`."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:MAX_REASON]
            raise TokenizerError(
                f"tokenizer.json was refused by the tokenizers wheel: {reason}; expected a file "
                "as Hugging Face writes it; fetch or export the file again"
            ) from None
        raise
