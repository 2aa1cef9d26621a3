"""What the app says, one file per language; and text that runs from right to left.

Kivy draws characters in the order of the string, from left to right. So Arabic letters are joined
and lines are put into visual order here, after they were broken in logical order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from importlib import resources

import arabic_reshaper
from bidi.algorithm import get_display

LANGUAGES = {"en": "English", "de": "Deutsch", "ar": "العربية"}
_RTL = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_STRONG = re.compile(
    "([\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc])|([A-Za-z\u00c0-\u02af\u0370-\u052f])"
)


@cache
def table(language: str) -> dict[str, str]:
    """The texts of a language by key."""
    file = resources.files(__package__).joinpath(f"{language}.json")
    found: dict[str, str] = json.loads(file.read_text("utf-8"))
    return found


def translate(language: str, key: str, **values: object) -> str:
    """The text of a key, with its {places} filled."""
    return table(language)[key].format(**values)


def is_rtl(language: str) -> bool:
    return language == "ar"


def has_rtl(text: str) -> bool:
    return _RTL.search(text) is not None


def runs_rtl(text: str, otherwise: bool = False) -> bool:
    """Whether a paragraph runs from right to left: its first letter says so."""
    strong = _STRONG.search(text)
    return otherwise if strong is None else strong[1] is not None


def shaped(text: str) -> str:
    """With Arabic letters joined, in logical order."""
    joined: str = arabic_reshaper.reshape(text)
    return joined


def visual(
    text: str, width: float = math.inf, measure: Callable[[str], float] = lambda _: 0.0
) -> str:
    """Broken into lines no wider than ``width``, each in the order in which it is drawn.

    measure: the width of a joined text.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        base = "R" if runs_rtl(paragraph) else "L"
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and measure(shaped(longer)) > width:
                lines.append(_ordered(line, base))
                line = word
            else:
                line = longer
        lines.append(_ordered(line, base))
    return "\n".join(lines)


def _ordered(line: str, base: str) -> str:
    shown: str = get_display(shaped(line), base_dir=base)
    return shown
