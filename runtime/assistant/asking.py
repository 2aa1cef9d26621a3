"""The kind of answer that a question wants, and whether a sentence holds one."""

from __future__ import annotations

import re
from typing import Literal

Wanted = Literal["number", "time", "person", ""]

_LISTED = re.compile(r"\S+")
_TIME = re.compile(
    r"^(?:(?:by|until|till|since|from|at|on) )?(?:when|what time|which (?:day|date|year|hour))\b"
    r"|\bat what (?:time|hour)\b|^(?:ab |bis |seit )?wann\b|^um wie viel uhr\b"
    r"|^(?:depuis |jusqu'à )?quand\b|^à quelle (?:heure|date)\b|cuándo\b|\ba qué hora\b"
    r"|متى|什么时候|何时|几点|哪天",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"\bhow (?:many|much|high|long|often|big|large|old|far|tall|loud|heavy|deep|wide|fast)\b"
    r"|\b(?:cost|price|rent|fee|charge|weigh|salary|salaries)\b|\bup to what\b"
    r"|\bwhat (?:share|percentage|number|size|distance|span)\b|\bpay\b"
    r"|\bwie (?:viel\w*|hoch|groß|lang\w*|weit|schwer|oft|alt|hart|teuer)\b|\bkoste\w*\b"
    r"|\bcombien\b|\bquel(?:le)? (?:durée|prix|âge|taille|montant)\b|\bcuánt[oa]s?\b|\bqué precio\b"
    r"|\bdesde qué edad\b|كم|多少|几|多久|多长|多大",
    re.IGNORECASE,
)
_PERSON = re.compile(
    r"^(?:to |from |by |with )?who(?:m|se)?\b|^(?:von |mit |bei )?we[rmn]\b"
    r"|^(?:à |avec |par )?qui\b"
    r"|quién(?:es)?\b|\bcómo se llama\b|^من |谁",
    re.IGNORECASE,
)
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
_HOLDS_TIME = re.compile(rf"\d|\b(?:{'|'.join(_DAYS)})\b|[年月日点时]", re.IGNORECASE)
_NAME = re.compile(r"(?<=[^\s.!?:]\s)[A-ZÀ-Þ][\w'’-]+|\b(?:I|we|We|wir|nous)\b")
_CASELESS = re.compile(r"[\u0620-\u064a\u3040-\u9fff\uac00-\ud7af]")


def wanted(question: str) -> Wanted:
    """The kind of answer: a number (how much), a time (when), a person (who), or any."""
    question = question.strip(" ¿¡\"'“„«")
    if _TIME.search(question):
        return "time"
    if _PERSON.search(question):
        return "person"
    return "number" if _NUMBER.search(question) else ""


def asking_words(question: str) -> str:
    """The words that say which kind of answer a question wants, such as "How much" and "cost"."""
    found = (pattern.search(question.strip(" ¿¡\"'“„«")) for pattern in (_TIME, _PERSON, _NUMBER))
    return " ".join(match.group().strip() for match in found if match)


def holds(sentence: str, kind: Wanted) -> float:
    """1 if a sentence holds what is wanted, -1 if it does not, 0 if that cannot be told."""
    if not kind:
        return 0.0
    if kind == "person":
        if _NAME.search(sentence):
            return 1.0
        return 0.0 if _CASELESS.search(sentence) else -1.0
    found = (_HOLDS_TIME if kind == "time" else _HOLDS_NUMBER).search(sentence)
    return 1.0 if found else -1.0
