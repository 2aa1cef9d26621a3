"""The kind of answer that a question wants, and whether a sentence holds one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pocketslm.runtime.assistant.words import words

Kind = Literal[
    "time", "person", "money", "weight", "size", "phone", "colour", "count", "number", ""
]
# "money", "weight", "size" and "phone" are numbers with a unit or of a form, "count" is a number of
# things.

_LISTED = re.compile(r"\S+")
_TIME = re.compile(
    r"^(?:(?:by|until|till|since|from|at|on) )?(?:when|what time|which (?:day|date|year|hour))\b"
    r"|\bat what (?:time|hour)\b|^(?:ab |bis |seit )?wann\b|^um wie viel uhr\b"
    r"|^(?:depuis |jusqu'à )?quand\b|^à quelle (?:heure|date)\b|cuándo\b|\ba qué hora\b"
    r"|متى|什么时候|何时|几点|哪天",
    re.IGNORECASE,
)
_PERSON = re.compile(
    r"^(?:to |from |by |with )?who(?:m|se)?\b|^(?:von |mit |bei )?we[rmn]\b"
    r"|^(?:à |avec |par )?qui\b"
    r"|quién(?:es)?\b|\bcómo se llama\b|^من |谁",
    re.IGNORECASE,
)
_COUNT = re.compile(r"\bhow many|\bwie viele|\bcombien d(?:e |')|\bcuánt[oa]s", re.IGNORECASE)
_NUMBER = re.compile(
    r"\bhow (?:many|much|high|long|often|big|large|old|far|tall|loud|heavy|deep|wide|fast)\b"
    r"|\b(?:cost|price|rent|fee|charge|weigh|salary|salaries)\b|\bup to what\b"
    r"|\bwhat (?:share|percentage|number|size|distance|span)\b|\bpay\b"
    r"|\bwie (?:viel\w*|hoch|groß|lang\w*|weit|schwer|oft|alt|hart|teuer)\b|\bkoste\w*\b"
    r"|\bcombien\b|\bquel(?:le)? (?:durée|prix|âge|taille|montant)\b|\bcuánt[oa]s?\b|\bqué precio\b"
    r"|\bdesde qué edad\b|كم|多少|几|多久|多长|多大",
    re.IGNORECASE,
)
# Kinds of numbers and names that their units, or a list, tell: what asks for them, what holds them.
_FORMS: dict[Kind, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "money": (
        re.compile(
            r"\b(?:costs?|price|fee|salary|salaries)\b"
            r"|\bhow (?:much|high) .*\b(?:pay|charge|spent|rent|premium)\b"
            r"|\bkoste[nt]*\b|\bpreis\b|\bwie (?:hoch|viel) .*(?:miete|beitrag|gebühr|kaution)\b"
            r"|\bcoûte\w*|\bprix\b|\bmontant\b|\bcuesta\w*|\bcostó\b|\bprecio\b"
            r"|سعر|ثمن|غرامة|价格|多少钱",
            re.IGNORECASE,
        ),
        re.compile(
            r"[€$£¥]|\b(?:eur\w*|dollars?|pounds?|cents?|pence|gbp|usd|kroner|francs?|pesos?)\b"
            r"|\bfree of charge\b|\bgratis\b|\bgratuit\w*|\bkostenlos\b|دينار|قرش|قروش|ريال|درهم|元"
            r"|\|.*\d\d",  # a row of a table, whose unit may stand above it
            re.IGNORECASE | re.DOTALL,
        ),
    ),
    "weight": (
        re.compile(
            r"\bhow heavy\b|\bweighs?\b|\bwie schwer\b|\bwiegt\b|\bpèse\b|\bpesa\b|多重|وزن", re.I
        ),
        re.compile(
            r"\d\s*(?:kg|g|t)\b|\b(?:kilo|gram|pound|ounce|tonne|ton\b)\w*|公斤|克|غرام", re.I
        ),
    ),
    "size": (
        re.compile(r"\bhow much (?:memory|ram|space|disk)|\bwie viel speicher|内存", re.I),
        re.compile(r"\d\s*(?:[KMGT]i?B|kilobytes?|megabytes?|gigabytes?)\b", re.I),
    ),
    "phone": (
        re.compile(
            r"\bphone number\b|\btelephone\b|\btelefonnummer\b|\bteléfono\b|\btéléphone\b"
            r"|هاتف|电话",
            re.I,
        ),
        re.compile(r"\d[\d ()/-]{1,}\d"),
    ),
    "colour": (
        re.compile(
            r"\bwh(?:at|ich) colou?rs?\b|\bfarben?\b|\bcouleurs?\b|\bcolor(?:es)?\b|لون|颜色", re.I
        ),
        re.compile(
            r"\b(?:red|blue|green|yellow|white|black|brown|grey|gray|orange|purple|pink|golden|silver"
            r"|rot\w*|blau\w*|grün\w*|gelb\w*|weiß\w*|schwarz\w*|rouges?|bleue?s?|verte?s?|jaunes?"
            r"|blanc\w*|noire?s?|roj[oa]s?|azul\w*|verdes?|amarill[oa]s?|blanc[oa]s?|negr[oa]s?)\b"
            r"|أحمر|أزرق|أخضر|أصفر|أبيض|أسود|[红蓝绿黄白黑]色?",
            re.I,
        ),
    ),
}
_NUMBER_WORDS = _LISTED.findall(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
    ninety hundred thousand million half quarter quarters third thirds once twice thrice
    dozen first second ein eine einen eins zwei drei vier fünf sechs sieben acht neun zehn
    elf zwölf zwanzig dreißig hundert tausend einmal zweimal halb dritten ersten un une deux
    trois quatre cinq six sept huit neuf dix onze douze quinze vingt trente quarante cent
    mille demi uno dos tres cuatro cinco seis siete ocho nueve diez once doce quince
    dieciséis veinte treinta cien cinco mil medio واحد واحدة اثنين ثلاثة أربعة خمسة ستة سبعة
    ثمانية تسعة عشرة عشر عشرين عشرون ثلاثون مئة ألف ربع نصف مرة سنتين شهرين يومين
    """
)
_DAYS = _LISTED.findall(
    """
    monday tuesday wednesday thursday friday saturday sunday january february march april
    may june july august september october november december easter christmas noon midnight
    evening morning night weekday weekdays o'clock a.m p.m montag montags dienstag mittwoch
    donnerstag freitag samstag sonntag januar februar märz mai juni juli oktober dezember
    werktag morgens abends uhr lundi mardi mercredi jeudi vendredi samedi dimanche janvier
    février mars avril mai juin juillet août septembre octobre novembre décembre matin soir
    midi lunes martes miércoles jueves viernes sábado domingo enero febrero marzo abril mayo
    junio julio agosto septiembre octubre noviembre diciembre mañana tarde noche anochecer
    السبت الأحد الاثنين اثنين الثلاثاء ثلاثاء الأربعاء الخميس الجمعة صباحا مساء
    """
)
_HOLDS_NUMBER = re.compile(
    rf"\d|\b(?:{'|'.join(_NUMBER_WORDS)})\b|[一二三四五六七八九十百千万两半]", re.IGNORECASE
)
_HOLDS_TIME = re.compile(rf"\d|\b(?:{'|'.join(_DAYS)})s?\b|[年月日点时]", re.IGNORECASE)
_NAME = re.compile(r"(?<=[^\s.!?:]\s)[A-ZÀ-Þ][\w'’-]+|\b(?:I|we|We|wir|nous)\b")
_NO_PERSON = frozenset((*_DAYS, "year", "mr", "mrs", "saint", "room", "class", "chapter"))
# Between a number and the things that it counts.
_NEAR = 2
_WORD = re.compile(r"\w[\w'’-]*")
_CASELESS = re.compile(r"[\u0620-\u064a\u3040-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a question wants: a kind of answer, and of a "count" the term that is counted. ``asked``
    are the question's words: a name among them is no answer.
    """

    kind: Kind
    counted: str = ""
    asked: frozenset[str] = frozenset()


def wanted(question: str, language: str = "en") -> Wanted:
    """The kind of answer: a time (when), a person (who), some kind of number (how much), or any."""
    question = question.strip(" ¿¡\"'“„«")
    if _TIME.search(question):
        return Wanted("time")
    if _PERSON.search(question):
        return Wanted("person", asked=frozenset(_WORD.findall(question.lower())))
    if match := _COUNT.search(question):
        things = words(question[match.end() :], language)
        return Wanted("count", next((word.term for word in things), ""))
    for kind, (asks, _) in _FORMS.items():
        if asks.search(question):
            return Wanted(kind)
    return Wanted("number" if _NUMBER.search(question) else "")


def asking_words(question: str) -> str:
    """The words that say which kind of answer a question wants, such as "How much" and "cost"."""
    found = (pattern.search(question.strip(" ¿¡\"'“„«")) for pattern in (_TIME, _PERSON, _NUMBER))
    return " ".join(match.group().strip() for match in found if match)


def holds(sentence: str, want: Wanted, language: str = "en") -> float:
    """1 if a sentence holds what is wanted, -1 if it does not, 0 if that cannot be told."""
    if not want.kind:
        return 0.0
    if want.kind == "person":
        names = (name.lower() for name in _NAME.findall(sentence))
        if any(name not in want.asked and name not in _NO_PERSON for name in names):
            return 1.0
        return 0.0 if _CASELESS.search(sentence) else -1.0
    if want.kind in _FORMS:
        return 1.0 if _FORMS[want.kind][1].search(sentence) else -1.0
    found = (_HOLDS_TIME if want.kind == "time" else _HOLDS_NUMBER).search(sentence)
    if not found:
        return -1.0
    return _counts(sentence, want.counted, language) if want.kind == "count" else 1.0


def _counts(sentence: str, counted: str, language: str) -> float:
    """Whether a number stands beside the things that are counted; 0 if the things are not named."""
    found = list(words(sentence, language))
    things = [at for at, word in enumerate(found) if word.term == counted]
    if not things:
        return 0.0
    figures = [
        at
        for at, word in enumerate(found)
        if _HOLDS_NUMBER.fullmatch(sentence[word.start : word.end])
        or sentence[word.start].isdigit()
    ]
    return 1.0 if any(abs(a - b) <= _NEAR for a in things for b in figures) else -1.0
