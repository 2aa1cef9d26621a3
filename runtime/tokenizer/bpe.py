"""Byte-pair encoding in pure Python: the reader for platforms without the `tokenizers` wheel.

It gives the ids that the wheel gives, for byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM)
and for SentencePiece-style ones with byte fallback (Llama 2, TinyLlama, Gemma); for the other
models see `unigram` and `wordpiece`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import cast

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields, pretokenizers
from pocketslm.runtime.tokenizer.normalizers import Normalizer
from pocketslm.runtime.tokenizer.unigram import Unigram
from pocketslm.runtime.tokenizer.vocabulary import Cutter, Vocabulary
from pocketslm.runtime.tokenizer.wordpiece import WordPiece

CACHED_WORDS = 1 << 15
CACHED_LENGTH = 64
"""Words up to this many characters are remembered; longer ones hardly come back."""

_MARK = "▁"
_MARKED_WORDS = re.compile(f"{_MARK}*[^{_MARK}]+|{_MARK}+")


class Bpe:
    """A `model` of type BPE: ids of one word.

    Raises `TokenizerError` for options that are not supported and for merges of unknown tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        model = vocabulary.model
        self._ids = vocabulary.ids
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise fields.unsupported(f"model.{key}", model[key], ("null",))
        self._byte_fallback = fields.optional(model, "byte_fallback", bool, False, "model")
        self._fuse_unk = fields.optional(model, "fuse_unk", bool, False, "model")
        self._ignore_merges = fields.optional(model, "ignore_merges", bool, False, "model")
        unknown = fields.optional(model, "unk_token", str, "", "model")
        if unknown and unknown not in self._ids:
            raise TokenizerError(
                f"tokenizer.json: model.unk_token {unknown!r} is not in model.vocab; expected one "
                "of its tokens or null; fetch or export the file again"
            )
        self._unknown = self._ids[unknown] if unknown else None
        self._bytes = [self._ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._merges = self._read_merges(fields.field(model, "merges", list, "model"))
        self._cached = lru_cache(maxsize=CACHED_WORDS)(self._merge)

    def _read_merges(self, merges: list[object]) -> dict[tuple[int, int], tuple[int, int]]:
        """(left id, right id) -> (rank, id of the merged token)."""
        ids = self._ids
        out = {}
        marks_inside = _MARK not in ids
        for rank, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            try:
                left, right = map(str, cast("list[object]", pair))
                joined = left + right
                out[ids[left], ids[right]] = rank, ids[joined]
            except (TypeError, ValueError, KeyError):
                raise TokenizerError(
                    f"tokenizer.json: model.merges[{rank}] is {str(merge)[:80]!r}; expected two "
                    "tokens that, like their concatenation, are in model.vocab; "
                    "fetch or export the file again"
                ) from None
            marks_inside = marks_inside or _MARK in joined.lstrip(_MARK)
        # If no merge leads across the left edge of a mark, words end there and can be cached.
        self._cut_at_marks = not marks_inside
        return out

    def encode(self, word: str) -> list[int]:
        """The ids of `word`, which pre-tokenization will not split further."""
        if self._ignore_merges and word in self._ids:
            return [self._ids[word]]
        if len(word) <= CACHED_LENGTH:
            return list(self._cached(word))
        if not (self._cut_at_marks and _MARK in word):
            return list(self._merge(word))
        out: list[int] = []
        for part in _MARKED_WORDS.findall(word):
            out += self._cached(part) if len(part) <= CACHED_LENGTH else self._merge(part)
        return out

    def _symbols(self, word: str) -> list[int]:
        """One id per character, per byte of an unknown character, or per unknown run."""
        ids = self._ids
        out = []
        pending = False  # an unknown character that is not in `out` yet
        for char in word:
            symbol = ids.get(char)
            if symbol is not None:
                if pending and self._unknown is not None:
                    out.append(self._unknown)
                    pending = False
                out.append(symbol)
                continue
            if self._byte_fallback:
                found = [self._bytes[byte] for byte in char.encode()]
                if None not in found:
                    out += [id_ for id_ in found if id_ is not None]
                    continue
            if self._unknown is not None:
                if pending and not self._fuse_unk:
                    out.append(self._unknown)
                pending = True
        if pending and self._unknown is not None:
            out.append(self._unknown)
        return out

    def _merge(self, word: str) -> tuple[int, ...]:
        """Merges pairs in the order of their rank, the leftmost first: O(n log n).

        `symbols` is a doubly linked list; a merged pair lives on at its left place, and the
        right one becomes -1. Heap entries are not removed when they go stale: an entry counts
        if the pair at its place still merges to the entry's id.
        """
        symbols = self._symbols(word)
        merges = self._merges
        heap = [
            (*merges[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in merges
        ]
        if not heap:
            return tuple(symbols)
        # Same order as (rank, place): a rank belongs to one pair and so to one id.
        heapify(heap)
        end = len(symbols)
        following = list(range(1, end + 1))
        preceding = list(range(-1, end - 1))
        while heap:
            _, merged, place = heappop(heap)
            right = following[place]
            if symbols[place] < 0 or right == end:
                continue
            current = merges.get((symbols[place], symbols[right]))
            if current is None or current[1] != merged:
                continue
            symbols[place] = merged
            symbols[right] = -1
            after = following[place] = following[right]
            if after != end:
                preceding[after] = place
                entry = merges.get((merged, symbols[after]))
                if entry is not None:
                    heappush(heap, (*entry, place))
            before = preceding[place]
            if before >= 0:
                entry = merges.get((symbols[before], merged))
                if entry is not None:
                    heappush(heap, (*entry, before))
        return tuple(symbol for symbol in symbols if symbol >= 0)


class PythonEncoder:
    """Text to ids with nothing but the standard library."""

    name = "python"

    def __init__(
        self,
        document: Mapping[str, object],
        vocabulary: Vocabulary,
        normalizer: Normalizer | None,
    ) -> None:
        self._pretokenize = pretokenizers.build(document.get("pre_tokenizer"))
        self._model: Bpe | Unigram | WordPiece
        kind = vocabulary.model.get("type", "BPE")
        if kind == "Unigram":
            # Special tokens are pieces of it, which no ordinary text may become.
            self._model = Unigram(vocabulary)
            special = {token.content for token in vocabulary.added if token.special}
            self._ordinary: Bpe | Unigram | WordPiece = self._model.without(special)
        else:
            self._model = WordPiece(vocabulary) if kind == "WordPiece" else Bpe(vocabulary)
            self._ordinary = self._model
        self._cutter = Cutter(vocabulary.added, normalizer)

    def encode(self, text: str, *, parse_special: bool, at_start: bool = True) -> list[int]:
        """The ids of `text`; `at_start` says that nothing stands before it."""
        out: list[int] = []
        encode_word = (self._model if parse_special else self._ordinary).encode
        for part, id_, starts in self._cutter.cut(text, parse_special, at_start):
            if id_ is not None:
                out.append(id_)
            else:
                for word in self._pretokenize([part], starts):
                    out += encode_word(word)
        return out
