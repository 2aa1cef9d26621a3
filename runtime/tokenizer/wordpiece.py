"""WordPiece in pure Python, the model of BERT's vocabularies."""

from __future__ import annotations

from functools import lru_cache

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.vocabulary import Vocabulary

CACHED_WORDS = 1 << 15


class WordPiece:
    """A `model` of type WordPiece: ids of one word.

    Raises `TokenizerError` where the vocabulary lacks the unknown token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        model = vocabulary.model
        self._ids = vocabulary.ids
        self._prefix = fields.optional(model, "continuing_subword_prefix", str, "##", "model")
        self._longest = fields.optional(model, "max_input_chars_per_word", int, 100, "model")
        unknown = fields.optional(model, "unk_token", str, "[UNK]", "model")
        if unknown not in self._ids:
            raise TokenizerError(
                f"tokenizer.json: model.unk_token {unknown!r} is not in model.vocab; expected one "
                "of its tokens; fetch or export the file again"
            )
        self._unknown = self._ids[unknown]
        # No piece is longer than the longest token, whatever max_input_chars_per_word allows.
        self._longest_piece = max(map(len, self._ids))
        self._cached = lru_cache(maxsize=CACHED_WORDS)(self._pieces)

    def encode(self, word: str) -> list[int]:
        """The ids of `word`, which pre-tokenization will not split further."""
        return [self._unknown] if len(word) > self._longest else list(self._cached(word))

    def _pieces(self, word: str) -> tuple[int, ...]:
        """The longest token that the word begins with, then that of the rest, and so on."""
        out = []
        start, prefix = 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest_piece), start, -1):
                if (id_ := self._ids.get(prefix + word[start:end])) is not None:
                    break
            else:
                return (self._unknown,)
            out.append(id_)
            start, prefix = end, self._prefix
        return tuple(out)
