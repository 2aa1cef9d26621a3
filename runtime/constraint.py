"""Constrained decoding: which tokens may come next, by a JSON schema, an expression or a grammar.

The masks come from the native operators (``runtime/ops/grammar``), for every backend: they need the
tokens' bytes and no model.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends.native_library import ErrorText, load_library
from pocketslm.runtime.config import ConstraintKind
from pocketslm.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt

KINDS: dict[ConstraintKind, int] = {"json_schema": 1, "regex": 2, "grammar": 3}
MAY_END, MUST_END = 1, 2


class TokenTexts:
    """The bytes of every token of a vocabulary, as a tree. Safe to use from several threads.

    - ``texts``: the bytes of each token, empty for tokens that are never allowed, such as special
      ones.
    - ``ends``: the tokens that end a text.
    - ``strip``: the leading space of a text's first token is not part of the text.
    """

    def __init__(
        self, texts: Sequence[bytes], ends: Collection[int] = (), *, strip: bool = False
    ) -> None:
        self.count = len(texts)
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        offsets = array("Q", accumulate(map(len, texts), initial=0))
        last = array("i", sorted(ends))
        error = ErrorText()
        status = self._library.pslm_vocabulary_open(
            b"".join(texts),
            offsets.buffer_info()[0],
            len(texts),
            *last.buffer_info(),
            int(strip),
            ctypes.byref(self._handle),
            error.argument,
        )
        error.check(status)

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> TokenTexts:
        """The bytes of a tokenizer's tokens, for a model with ``size`` logits."""
        special = tokenizer.special_ids | tokenizer.eos_token_ids
        texts = [b"" if id_ in special else tokenizer.token_bytes(id_) for id_ in range(size)]
        spaced = next(
            (id_ for id_, text in enumerate(texts) if len(text) > 1 and text[:1] == b" "), -1
        )
        strip = tokenizer.leading_strip == (" ", 1) or (
            spaced >= 0 and tokenizer.token_bytes(spaced, first=True) != texts[spaced]
        )
        ends = [id_ for id_ in tokenizer.eos_token_ids if id_ < size]
        return cls(texts, ends, strip=strip)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_vocabulary_close(self._handle)


@lru_cache(maxsize=16)
def read_grammar(kind: ConstraintKind, text: str) -> Grammar:
    """Read a grammar, or take it from the few read last. Raises UsageError as :class:`Grammar`
    does.
    """
    return Grammar(kind, text)


class Grammar:
    """A schema, an expression or a grammar, read. Safe to use from several threads.

    Raises UsageError, which names the part that is wrong or not supported.
    """

    def __init__(self, kind: ConstraintKind, text: str) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        error, data = ErrorText(), text.encode("utf-8", "surrogatepass")
        status = self._library.pslm_grammar_open(
            KINDS[kind], data, len(data), ctypes.byref(self._handle), error.argument
        )
        error.check(status, kind)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_grammar_close(self._handle)


class Constraint:
    """Follows one text token by token, and says which tokens a grammar allows next.

    What it learned about the grammar survives :meth:`restart`, so that a second text costs less.
    """

    def __init__(self, grammar: Grammar, texts: TokenTexts) -> None:
        self.texts = texts
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._error = ErrorText()
        self._lock = threading.Lock()
        status = self._library.pslm_constraint_open(
            grammar._handle, texts._handle, ctypes.byref(self._handle), self._error.argument
        )
        self._error.check(status)

    @property
    def handle(self) -> ctypes.c_void_p:
        """For the native engine, which then moves it along itself."""
        return self._handle

    def restart(self) -> None:
        """Begin a new text."""
        with self._lock:
            self._library.pslm_constraint_restart(self._handle)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity, in place.

        Raises UsageError if no token may come next: the vocabulary cannot write such a text.
        """
        assert logits.dtype == np.float32
        assert logits.flags.c_contiguous
        with self._lock:
            status = self._library.pslm_constraint_apply(
                self._handle, logits.ctypes.data, logits.size, self._error.argument
            )
            self._error.check(status)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Whether each token [V] may come next."""
        words = np.zeros(-(-self.texts.count // 64), np.uint64)
        with self._lock:
            status = self._library.pslm_constraint_mask(
                self._handle, words.ctypes.data, words.size, self._error.argument
            )
            self._error.check(status)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bits[: self.texts.count].astype(np.bool_)

    def advance(self, token: int) -> None:
        """Append a token. Raises UsageError, and changes nothing, if it may not come next."""
        with self._lock:
            status = self._library.pslm_constraint_advance(
                self._handle, token, self._error.argument
            )
            self._error.check(status)

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return bool(self._state() & MAY_END)

    @property
    def must_end(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._state() & MUST_END)

    def _state(self) -> int:
        with self._lock:
            return int(self._library.pslm_constraint_state(self._handle))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_constraint_close(self._handle)
