"""What both implementations share: the ids, the added tokens and how a text is cut at them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.decoders import Decoder
from pocketslm.runtime.tokenizer.normalizers import Normalizer
from pocketslm.runtime.tokenizer.unicode_classes import WHITE_SPACE, characters, word

MODELS = ("BPE", "Unigram", "WordPiece")
_SPACES = characters(WHITE_SPACE)
_SLACK = 1024  # ids that may be unused: vocabularies are padded, but not to billions


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text itself, before anything is split or merged."""

    id: int
    content: str
    special: bool
    normalized: bool  # it is looked for in the normalized text, in its normalized form
    single_word: bool  # only where no word character touches it
    lstrip: bool  # it takes the white space before it along
    rstrip: bool  # it takes the white space after it along


class Vocabulary:
    """Token texts, ids and added tokens of a `tokenizer.json`.

    Raises `TokenizerError` for a malformed vocabulary, for ids that are used twice or lie far
    beyond the vocabulary, and for added tokens whose id is not the one that Hugging Face's
    reader would give them (it ignores the file's id).
    """

    def __init__(self, document: Mapping[str, object], normalizer: Normalizer | None) -> None:
        model = fields.mapping(document.get("model"), "model")
        kind = model.get("type", "BPE")
        if kind not in MODELS:
            raise fields.unsupported("model type", kind, MODELS)
        self.model = model
        self.texts: dict[int, str]
        self.ids: dict[str, int]
        if kind == "Unigram":
            self.texts = dict(enumerate(listed_pieces(model)))
            self.ids = {text: id_ for id_, text in self.texts.items()}
        else:
            self.ids = _numbered_tokens(model)
            self.texts = {id_: text for text, id_ in self.ids.items()}
        self.added = self._read_added(document)
        self.special_ids = frozenset(token.id for token in self.added if token.special)
        self.normalized: dict[int, str] = {
            token.id: normalizer(token.content) if normalizer else token.content
            for token in self.added
            if token.normalized
        }
        for token in self.added:
            self.texts[token.id] = self.normalized.get(token.id, token.content)

    def _read_added(self, document: Mapping[str, object]) -> list[AddedToken]:
        found: dict[str, AddedToken] = {}
        next_id = len(self.texts)
        for token in added_tokens(document):
            expected = self.ids.get(token.content)
            if expected is None and token.content in found:
                expected = found[token.content].id
            if expected is None:
                expected, next_id = next_id, next_id + 1
            if token.id != expected:
                raise TokenizerError(
                    f"tokenizer.json: added token {token.content!r} has id {token.id}; expected "
                    f"{expected}, its place in the vocabulary; fetch or export the file again"
                )
            found[token.content] = token
        return list(found.values())

    @cached_property
    def size(self) -> int:
        """One more than the largest id, so that every id indexes an array of this length."""
        return max(self.texts, default=-1) + 1

    def id_of(self, text: str) -> int | None:
        """The id of an added or ordinary token; None if there is none."""
        for token in self.added:
            if token.content == text:
                return token.id
        return self.ids.get(text)

    def text_of(self, id_: int) -> str | None:
        """The text of a token; None for an id that is not used."""
        return self.texts.get(id_)

    def bytes_of(self, id_: int, decoder: Decoder, *, first: bool) -> bytes | None:
        """What a token stands for, with `first` at the start of a text; None for an unused id."""
        text = self.texts.get(id_)
        return None if text is None else (decoder.first if first else decoder.inner)(text)


def listed_pieces(model: Mapping[str, object]) -> list[str]:
    """The pieces of a Unigram, whose `vocab` is a list of [piece, score] by id."""
    pieces: list[str] = []
    for entry in fields.field(model, "vocab", list, "model"):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TokenizerError(
                f"tokenizer.json: model.vocab[{len(pieces)}] is {str(entry)[:80]}; expected a "
                "piece and its score; fetch or export the file again"
            )
        pieces.append(entry[0])
    return pieces


def _numbered_tokens(model: Mapping[str, object]) -> dict[str, int]:
    ids: dict[str, int] = fields.field(model, "vocab", dict, "model")
    limit = 2 * len(ids) + _SLACK
    if not all(type(id_) is int and 0 <= id_ < limit for id_ in ids.values()):
        raise TokenizerError(
            f"tokenizer.json: model.vocab has an id that is not an integer from 0 to {limit}; "
            "expected token -> id without large gaps; fetch or export the file again"
        )
    if len(set(ids.values())) != len(ids):
        raise TokenizerError(
            "tokenizer.json: model.vocab gives two tokens the same id; expected one each; "
            "fetch or export the file again"
        )
    return ids


def added_tokens(document: Mapping[str, object]) -> Iterator[AddedToken]:
    """The added tokens of a `tokenizer.json` that have a text, in its order."""
    where = "added_tokens"
    for node in fields.optional(document, where, list, [], "tokenizer"):
        entry = fields.mapping(node, where)
        token = AddedToken(
            id=fields.field(entry, "id", int, where),
            content=fields.field(entry, "content", str, where),
            special=fields.field(entry, "special", bool, where),
            normalized=fields.field(entry, "normalized", bool, where),
            single_word=fields.optional(entry, "single_word", bool, False, where),
            lstrip=fields.optional(entry, "lstrip", bool, False, where),
            rstrip=fields.optional(entry, "rstrip", bool, False, where),
        )
        if token.content:
            yield token


def any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of `texts`, the longest where several start at the same place."""
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class Splitter:
    """Cuts a text at the added tokens that it holds, as Hugging Face's reader does.

    `forms` maps the text to look for to the token; of matches that start at the same place the
    longest wins.
    """

    def __init__(self, forms: Mapping[str, AddedToken]) -> None:
        self._forms = forms
        self._found = any_of(forms)

    def split(self, text: str, parse_special: bool) -> list[tuple[str, int | None]]:
        """Pieces with the id of the added token or None; special ones only if asked for."""
        if self._found is None:
            return [(text, None)] if text else []
        out: list[tuple[str, int | None]] = []
        done = 0
        for match in self._found.finditer(text):
            token = self._forms[match.group()]
            start, end = match.span()
            if token.special and not parse_special:
                continue
            if token.single_word and _touches_word(text, start, end):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(_SPACES)))
            if token.rstrip:
                end += len(text) - end - len(text[end:].lstrip(_SPACES))
            if done < start:
                out.append((text[done:start], None))
            out.append((text[start:end], token.id))
            done = end
        if done < len(text):
            out.append((text[done:], None))
        return out


class Cutter:
    """Cuts a text at its added tokens, and normalizes what lies between."""

    def __init__(self, added: Iterable[AddedToken], normalizer: Normalizer | None) -> None:
        self._normalize = normalizer or str
        tokens = list(added)
        self._raw = Splitter({t.content: t for t in tokens if not t.normalized})
        self._normalized = Splitter({self._normalize(t.content): t for t in tokens if t.normalized})

    def cut(
        self, text: str, parse_special: bool, at_start: bool
    ) -> Iterator[tuple[str, int | None, bool]]:
        """(part, id of the added token or None, whether it starts the text), in order."""
        for piece, added in self._raw.split(text, parse_special):
            if added is not None:
                yield piece, added, at_start
            else:
                for part, id_ in self._normalized.split(self._normalize(piece), parse_special):
                    yield part, id_, at_start
                    at_start = False
            at_start = False


def _touches_word(text: str, start: int, end: int) -> bool:
    def is_word(char: str) -> bool:
        return any(first <= ord(char) <= last for first, last in word())

    return (start > 0 and is_word(text[start - 1])) or (end < len(text) and is_word(text[end]))
