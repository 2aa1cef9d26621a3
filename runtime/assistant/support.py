"""Whether a document supports a model's sentence: its numbers, names, negations and words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pocketslm.runtime.assistant.language import has_names
from pocketslm.runtime.assistant.words import Word, terms, words

# The part of a sentence's own words that must stand in the text that supports it.
HELD = 0.8
# The part of all its words that must stand in the order of that text. In another order the words
# could swap the chair and the manager.
ORDER = 0.7
_TOKEN = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_GROUPS = re.compile(r"(?<=\d)[.,](?=\d{3}(?!\d))")
_WORDS = re.compile(r"[^\W\d_]+")
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_SPELLED = {word: str(value) for value, word in enumerate(_SMALL)} | {
    "thirty": "30",
    "forty": "40",
    "fifty": "50",
    "sixty": "60",
    "seventy": "70",
    "eighty": "80",
    "ninety": "90",
    "twice": "2",
    "hundred": "100",
    "thousand": "1000",
    "million": "1000000",
    "billion": "1000000000",
}
_UNCOUNTED = frozenset(("one", "zero"))  # pronouns and figures of speech
_NEGATIONS = re.compile(
    r"\b(?:no|not|never|none|nobody|nothing|neither|nor|without|cannot|\w+n['’]t|forbidden|prohibited|"
    r"excluded|except|unless|untersagt|verboten|nicht|kein\w*|nie|niemand|ohne|ne|pas|jamais|aucun\w*|"
    r"sans|interdit\w*|défendu\w*|nunca|sin|ningun\w*|prohibid\w*)\b|(?:لا|لم|لن|ليس|يمنع)\b|[不没勿]",
    re.IGNORECASE,
)
_YES = re.compile(r"^\W*(?:yes|ja|oui|sí)\b", re.IGNORECASE)


def ground_of(
    sentence: str, grounds: Sequence[str], question: str = "", language: str = "en"
) -> int | None:
    """The sentence of a document that supports a model's sentence, or None.

    A single sentence must hold it all: every number and name of the model's sentence stands in it
    or in the question, most of the model's words stand in it and in its order, and it negates if
    and only if the model's does. A model's sentence that only repeats the question is not
    supported, nor is one with half a quotation.
    """
    ours, said_no = set(terms(sentence, language)), bool(_NEGATIONS.search(sentence))
    new = ours - set(terms(question, language))
    if not new or sentence.count('"') % 2 or (said_no and _YES.match(sentence)):
        return None
    rest = {term for term in new if not term[0].isdigit() and term not in _SPELLED}
    figures = numbers(sentence)
    for at, ground in enumerate(grounds):
        known = f"{ground}\n{question}"
        if (
            bool(_NEGATIONS.search(ground)) == said_no
            and figures <= numbers(known)
            and not invented_names(sentence, known, language)
            and len(rest & set(terms(ground, language))) >= HELD * len(rest)
            and in_order(sentence, ground) >= ORDER
        ):
            return at
    return None


def in_order(sentence: str, ground: str) -> float:
    """The part of a sentence's words that stand in another in the same order."""
    ours, theirs = ([word.lower() for word in _TOKEN.findall(part)] for part in (sentence, ground))
    return common_words(ours, theirs) / max(1, len(ours))


def common_words(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for at, other in enumerate(theirs, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


def numbers(text: str) -> set[str]:
    """The numbers of a text in one form, in which 1,500 is 1500 and six is 6."""
    found = {_GROUPS.sub("", match).strip(".,:/-") for match in _NUMBER.findall(text)}
    # The parts of dates and times may be said apart.
    found |= {part for match in list(found) for part in re.split(r"[:/-]", match)}
    found |= {number.lstrip("0") or "0" for number in list(found)}
    spelled = (word.lower() for word in _WORDS.findall(text))
    return found | {
        _SPELLED[word] for word in spelled if word in _SPELLED and word not in _UNCOUNTED
    }


def invented_names(sentence: str, known: str, language: str) -> list[str]:
    """Capitalised words of a sentence that the known text does not have."""
    if not has_names(language):
        language = language if language == "de" else ""
    have = {word.lower() for word in _WORDS.findall(known)}
    stems = set(terms(known, language))
    return [
        sentence[word.start : word.end]
        for word in words(sentence, language)
        if _capital(sentence, word)
        and sentence[word.start : word.end].lower() not in have
        and word.term not in stems
    ]


def _capital(text: str, word: Word) -> bool:
    return text[word.start].isupper() and word.start > len(text) - len(text.lstrip(" \"'“„«"))
