"""Questions that go on from the one before, such as "And when?", said so that they stand alone.

Nothing is invented: a question takes over words of the question before it, and no others.
"""

from __future__ import annotations

import re

from pocketslm.runtime.assistant.asking import asking_words
from pocketslm.runtime.assistant.words import Word, words

# A question with more words of its own says what it is about, even if it has a pronoun.
MOST_OWN = 2
_GOES_ON = re.compile(
    r"^\W*(?:(?:and|but|or|so|then|und|aber|oder|et|mais|y|pero)\b|(?:what|how) about\b"
    r"|was ist mit\b|und was ist mit\b|et pour\b|y qué hay de\b|那么?|و(?=[متكأه]))[\s,]*",
    re.IGNORECASE,
)
_PRONOUN = re.compile(
    r"\b(?:it|its|he|him|his|she|her|hers|they|them|their|theirs|there|that|this|those|these"
    r"|er|ihn|ihm|es|ihr|ihre[nmrs]?|sein|seine[nmrs]?|dort|davon|dafür|damit"
    r"|il|elle|ils|elles|lui|leurs?|cela|ça|él|ella|ellos|ellas|sus?|eso|esto|allí)\b"
    r"|\b(?!^)sie\b|[他她它]"
)
_ASKS = re.compile(
    r"\b(?:who\w*|what|when|where|why|which|how|w(?:er|en|em|as|ann|o|arum|ie|ieso|elche\w*)"
    r"|qui|que|quoi|quand|où|pourquoi|comment|combien|quel\w*|qu[ée]|quién\w*|cuándo|d[óo]nde"
    r"|por qué|c[óo]mo|cuánt\w*|cuál\w*)\b|متى|أين|لماذا|كيف|كم|[谁哪几]|什么|多少",
    re.IGNORECASE,
)


def standing_alone(question: str, before: str, language: str) -> str:
    """A question with what it leaves to the question before it; the question itself where it leaves
    nothing.

    - ``before``: the question before it, standing alone; "" where there is none.

    "And the deck?" takes the words that ask ("cost"), "And when?" what was asked about, and "Who
    wrote it?" the names in the question before, or if it has none, what was asked about.
    """
    if not before:
        return question
    goes_on = _GOES_ON.match(question)
    rest = question[goes_on.end() :].strip() if goes_on else question
    own = list(words(rest, language))
    if goes_on and own and not _ASKS.search(rest):
        ask = asking_words(before)
        return f"{ask} {rest}" if ask else question
    if own and not (len(own) <= MOST_OWN and _refers(rest, own)):
        return question
    about = _about(before, language, names=bool(own))
    return f"{rest[:1].upper()}{rest[1:]} ({about})" if about else question


def _refers(question: str, own: list[Word]) -> bool:
    """Whether a pronoun in a question can only mean something outside it."""
    return _PRONOUN.search(question) is not None and not any(word.named for word in own)


def _about(question: str, language: str, *, names: bool) -> str:
    """The words that say what a question is about; if ``names``, its names where it has some."""
    for word in sorted(asking_words(question).split(), key=len, reverse=True):
        question = re.sub(rf"\b{re.escape(word)}\b", " ", question)
    found = list(words(question, language))
    named = [word for word in found if word.named or question[word.start].isdigit()]
    if names and any(word.named for word in named):
        found = named
    spans = dict.fromkeys((word.start, word.end) for word in found)
    return " ".join(question[start:end] for start, end in spans)
