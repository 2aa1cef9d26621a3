"""Unigram in pure Python, the model of SentencePiece's vocabularies (XLM-R, DeBERTa-v3, T5)."""

from __future__ import annotations

import math
from collections.abc import Container
from functools import lru_cache

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.vocabulary import Vocabulary

CACHED_WORDS = 1 << 15
CACHED_LENGTH = 64
"""Words up to this many characters are remembered; longer ones hardly come back."""
MAX_PIECE = 512
"""Characters of a piece, which bounds the time that a character of a text takes."""
UNKNOWN_PENALTY = 10.0
"""How much lower than the lowest score of a piece an unknown character's is."""


class Unigram:
    """A `model` of type Unigram: ids of one word, cut so that the scores of its pieces sum highest.

    pieces: piece -> (id, score). unknown: the token of what is in no piece. unknown_score: the
    score of a character that is in none.
    Raises `TokenizerError` for scores that are not finite numbers, pieces of more than `MAX_PIECE`
    characters and an unknown token that is not in the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        model = vocabulary.model
        scores = read_scores(vocabulary)
        self.unknown = fields.field(model, "unk_id", int, "model")
        if not 0 <= self.unknown < len(scores):
            raise TokenizerError(
                f"tokenizer.json: model.unk_id is {self.unknown}; expected a place in "
                f"model.vocab, 0 to {len(scores) - 1}; fetch or export the file again"
            )
        self._byte_fallback = fields.optional(model, "byte_fallback", bool, False, "model")
        self.unknown_score = min(scores) - UNKNOWN_PENALTY
        self.pieces = {piece: (id_, scores[id_]) for piece, id_ in vocabulary.ids.items()}
        lengths: dict[str, set[int]] = {}
        for piece in self.pieces:
            lengths.setdefault(piece[:1], set()).add(len(piece))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}
        if (longest := max(map(max, self._lengths.values()))) > MAX_PIECE:
            raise TokenizerError(
                f"tokenizer.json: model.vocab has a piece of {longest} characters; expected at "
                f"most {MAX_PIECE}; fetch or export the file again"
            )
        self._cached = lru_cache(maxsize=CACHED_WORDS)(self._best)

    def without(self, texts: Container[str]) -> Unigram:
        """The model that does not find these pieces in a text."""
        other = object.__new__(Unigram)
        other.__dict__.update(self.__dict__)
        other.pieces = {piece: found for piece, found in self.pieces.items() if piece not in texts}
        other._cached = lru_cache(maxsize=CACHED_WORDS)(other._best)
        return other

    def encode(self, word: str) -> list[int]:
        """The ids of `word`, which pre-tokenization will not split further."""
        return list(self._cached(word) if len(word) <= CACHED_LENGTH else self._best(word))

    def _best(self, word: str) -> tuple[int, ...]:
        """Viterbi; of equal sums the one whose last piece begins first."""
        pieces, lengths, unknown = self.pieces, self._lengths, self.unknown
        size = len(word)
        sums = [0.0] * (size + 1)
        starts = [-1] * (size + 1)  # of the last piece of the best cut up to here
        ids = [unknown] * (size + 1)
        for start, first in enumerate(word):
            before = sums[start]
            single = False
            for length in lengths.get(first, ()):
                end = start + length
                if end > size:
                    break
                found = pieces.get(word[start:end])
                if found is None:
                    continue
                single = single or length == 1
                total = found[1] + before
                if starts[end] < 0 or total > sums[end]:
                    sums[end], starts[end], ids[end] = total, start, found[0]
            if not single:
                end, total = start + 1, self.unknown_score + before
                if starts[end] < 0 or total > sums[end]:
                    sums[end], starts[end], ids[end] = total, start, unknown
        out: list[int] = []
        end = size
        while end:
            start = starts[end]
            if ids[end] != unknown:
                out.append(ids[end])
            else:
                while start and ids[start] == unknown:
                    start = starts[start]
                out += reversed(self._unknown_ids(word[start:end]))
            end = start
        return tuple(reversed(out))

    def _unknown_ids(self, text: str) -> list[int]:
        """The ids of neighbouring unknown characters, which count as one piece."""
        if text in self.pieces:
            return [self.pieces[text][0]]
        if self._byte_fallback:
            found = [self.pieces.get(f"<0x{byte:02X}>") for byte in text.encode()]
            if None not in found:
                return [id_ for id_, _ in filter(None, found)]
        return [self.unknown]


def read_scores(vocabulary: Vocabulary) -> list[float]:
    """The score of every piece in `model.vocab`, by id."""
    scores = []
    for piece, score in fields.field(vocabulary.model, "vocab", list, "model"):
        try:
            number = float(score) if type(score) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise TokenizerError(
                f"tokenizer.json: model.vocab gives {piece[:80]!r} the score {str(score)[:80]}; "
                "expected a finite number; fetch or export the file again"
            )
        scores.append(number)
    return scores
