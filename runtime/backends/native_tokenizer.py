"""The tokenizer that export packed into a ``model.slm``, over the C border of ``runtime/ops``."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.backends.native_library import ErrorText, load_library

if TYPE_CHECKING:
    from pocketslm.runtime.backends.native import NativeModel

SPECIAL, WHOLE, GOES_ON, NORMALIZED = 1, 2, 4, 8  # PSLM_TEXT_


class NativeTokenizer:
    """Text to ids and back, from the model file alone. Safe to use from several threads.

    size: one more than the largest id. takes_normalized: ``encode`` takes no text but what is
    normalized and has no added tokens; so it is for a Unigram. Raises :class:`BundleError` for a
    model whose tokenizer export could not pack.
    """

    name = "native"

    def __init__(self, model: NativeModel) -> None:
        self.model = model  # keeps the mapping alive
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        error = ErrorText()
        error.check(
            self._library.pslm_tokenizer_open(
                model._handle, ctypes.byref(self._handle), error.argument
            )
        )
        data, offsets, count = (
            ctypes.c_void_p(),
            ctypes.POINTER(ctypes.c_uint32)(),
            ctypes.c_size_t(),
        )
        status = self._library.pslm_tokenizer_pieces(
            self._handle, ctypes.byref(data), ctypes.byref(offsets), ctypes.byref(count)
        )
        error.check(status)
        self.size: int = count.value
        self.takes_normalized = bool(self._library.pslm_tokenizer_takes(self._handle) & NORMALIZED)
        self._data, self._offsets = data.value or 0, offsets

    def piece(self, id_: int) -> bytes:
        """The bytes of a token inside a text; empty for an id that is not used."""
        if not 0 <= id_ < self.size:
            return b""
        start, end = self._offsets[id_], self._offsets[id_ + 1]
        return ctypes.string_at(self._data + start, end - start)

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = False,
        add_special_tokens: bool = False,
        at_start: bool = True,
        normalized: bool = False,
    ) -> list[int]:
        """The ids of ``text``; the arguments are those of
        :meth:`pocketslm.runtime.tokenizer.Tokenizer.encode`.

        at_start: nothing stands before the text. normalized: it is, and has no added tokens. Raises
        :class:`UsageError` where this is not what ``takes_normalized`` says."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"cannot encode text with the lone surrogate {text[error.start]!r}; expected "
                "Unicode text; decode its source with errors='replace'"
            ) from None
        flags = SPECIAL * parse_special | WHOLE * add_special_tokens | GOES_ON * (not at_start)
        flags |= NORMALIZED * normalized
        call = self._library.pslm_encode
        # A byte becomes at most one token, unless NFC lengthens the text.
        return list(_filled(call, self._handle, data, len(data), flags, ctypes.c_int32, len(data)))

    def decode(self, ids: Sequence[int], *, goes_on: bool = False) -> bytes:
        """The bytes of ``ids`` without special tokens. They may end inside a character.

        ``goes_on``: these are not the first tokens of a text. WordPiece's spaces before signs stay.
        Raises :class:`UsageError` for ids outside the vocabulary.
        """
        tokens = array("i", [min(max(id_, -1), 2**31 - 1) for id_ in ids])
        data, size = tokens.buffer_info()
        call, flags = self._library.pslm_decode, GOES_ON * goes_on
        return bytes(_filled(call, self._handle, data, size, flags, ctypes.c_char, 8 * size))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_tokenizer_close(self._handle)


def _filled(call: Any, handle: Any, data: Any, size: int, flags: int, kind: Any, guess: int) -> Any:
    """The result of ``call``, in memory of the guessed size or else of the size it asks for."""
    count, error = ctypes.c_size_t(), ErrorText()
    for attempt in range(2):
        capacity = count.value if attempt else guess + 16
        out = (kind * capacity)()
        status = call(handle, data, size, flags, out, capacity, ctypes.byref(count), error.argument)
        if count.value <= capacity:
            break
    error.check(status)
    return out[: count.value]
