"""What a text's language changes: stems, stop words, and whether capitals mean names."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snowballstemmer.basestemmer import BaseStemmer

# Codes of ISO 639-1 by the names that Snowball and the stop words have.
NAMES = {
    "ar": "arabic",
    "ca": "catalan",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hi": "hindi",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
    "tr": "turkish",
}
# Languages whose script alone tells them.
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("ar", re.compile(r"[\u0620-\u064a]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
)
# A script counts if it has this part of the letters. Some Japanese texts have few kana.
_SCRIPT_SHARE = {"ja": 0.05}
_SHARE = 0.3
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]{2,}")
SAMPLE_CHARACTERS = 20_000
# A text with fewer stop words than this is in no language that we know: a table, code, names.
LEAST_STOP_WORDS = 0.12
# Languages whose capitals say nothing (every noun has one), or that have none.
_NO_NAMES = frozenset(("de", "ar", "zh", "ja", "ko", "hi"))
UNSPACED = frozenset(("zh", "ja", "ko"))

_LISTED = re.compile(r"\S+")
# English words that say nothing about what a passage is about.
_ENGLISH = frozenset(
    _LISTED.findall(
        """
    a about above after again against all also am an and any are as at be because been
    before being below between both but by can could did do does doing down during each few
    for from further had has have having he her here hers him his how i if in into is it its
    itself just let me more most my no nor not of off on once only or other our ours out
    over own same she should so some such than that the their theirs them then there these
    they this those through to too under until up us very was we were what when where which
    while who whom whose why will with would you your yours s t d ll m re ve don doesn didn
    isn wasn weren may might must article document text passage according tell say said says
    describe explain mention mentioned happen happened happens name give many much kind
    """
    )
)
# Question words of other languages that the lists lack. Numbers are never stop words.
_ASKING = {
    "de": "wie wer was wann wo warum wieso woher wohin welche welcher welches welchen viel viele "
    "muss müssen darf dürfen kann können gibt heißt lange hoch groß mache tue sage bis ab",
    "fr": "quel quelle quels quelles combien comment pourquoi quand qui que quoi où est-ce peut "
    "puis faut y a",
    "es": "qué quién quiénes cuándo cuánto cuánta cuántos cuántas cómo dónde cuál cuáles desde "
    "puedo hay va hago se llama",
    "ar": "ما من متى أين كم كيف لماذا هل أي ماذا هو هي يوجد اسم كان عن في",
    "it": "che chi quando quanto quanta quanti quante come dove perché quale quali",
    "nl": "wie wat wanneer waar waarom hoe hoeveel welke",
    "pt": "que quem quando quanto quanta quantos quantas como onde qual quais por",
}
_NUMBERS = frozenset(
    _LISTED.findall(
        """
    eins zwei drei vier fünf sechs sieben acht neun zehn deux trois quatre cinq six sept
    huit neuf dix uno dos tres cuatro cinco seis siete ocho nueve diez primero primera due
    tre quattro واحد اثنان ثلاثة أربعة اربعة خمسة ستة سبعة ثمانية تسعة عشرة عشر مليون مليار
    سنة سنوات عام عاما صباح مساء اليوم الوقت
    """
    )
)
# Forms of English verbs that Snowball's rules do not bring together, behind the first form.
_IRREGULAR = {
    form: first
    for first, *forms in map(
        str.split,
        """
        become became
        begin began begun
        bite bitten
        blow blew blown
        break broke broken
        bring brought
        build built
        buy bought
        catch caught
        choose chose chosen
        draw drew drawn
        drink drank drunk
        drive drove driven
        eat ate eaten
        fall fell fallen
        fight fought
        fly flew flown
        forbid forbade forbidden
        forget forgot forgotten
        freeze froze frozen
        give gave given
        grow grew grown
        hide hid hidden
        hold held
        know knew known
        lead led
        lend lent
        lose lost
        meet met
        pay paid
        ring rang rung
        rise risen
        run ran
        see seen
        sell sold
        send sent
        shake shook shaken
        sing sang sung
        sink sank sunk
        sleep slept
        speak spoke spoken
        spend spent
        steal stole stolen
        swim swam swum
        take took taken
        teach taught
        tell told
        throw threw thrown
        wear wore worn
        win won
        write wrote written
        """.strip().splitlines(),
    )
    for form in forms
}


def detect(text: str) -> str:
    """The language of a text, by its letters and commonest words, or "" if they do not tell."""
    sample = text[:SAMPLE_CHARACTERS]
    letters = len(_LETTER.findall(sample))
    if not letters:
        return ""
    for language, script in _SCRIPTS:
        if len(script.findall(sample)) > _SCRIPT_SHARE.get(language, _SHARE) * letters:
            return language
    often = Counter(word.lower() for word in _WORD.findall(sample))
    total = often.total()
    shares = {
        language: sum(count for word, count in often.items() if word in stop_words(language))
        for language in NAMES
        if language not in ("ar", "el", "hi", "ru")
    }
    best = max(shares, key=lambda language: (shares[language], language == "en"))
    return best if shares[best] >= LEAST_STOP_WORDS * total else ""


@cache
def stop_words(language: str) -> frozenset[str]:
    """Words of a language that say nothing about what a passage is about."""
    if language in ("en", ""):
        return _ENGLISH
    if language in UNSPACED:
        return frozenset()
    from stop_words import StopWordError, get_stop_words

    try:
        listed = frozenset(get_stop_words(language))
    except StopWordError:
        listed = frozenset()
    return (listed | frozenset(_ASKING.get(language, "").split())) - _NUMBERS


@lru_cache(maxsize=1 << 17)
def stem(word: str, language: str = "en") -> str:
    """The stem of a lower-case word, by Snowball's rules for the language."""
    if language in ("en", ""):
        word = _IRREGULAR.get(word, word)
    stemmer = _stemmer(language or "en")
    if stemmer is None or len(word) > 60 or not word.isalpha():
        return word
    return str(stemmer.stemWord(word))


@cache
def _stemmer(language: str) -> BaseStemmer | None:
    import snowballstemmer  # which reads the rules of every language

    name = NAMES.get(language)
    return snowballstemmer.stemmer(name) if name in snowballstemmer.algorithms() else None


def has_names(language: str) -> bool:
    """Whether a capital within a sentence means a name."""
    return language not in _NO_NAMES
