"""Which kind of answer a question wants, and which sentences hold one."""

from __future__ import annotations

import pytest

from pocketslm.runtime.assistant.asking import holds, wanted
from pocketslm.runtime.assistant.words import asked_terms


@pytest.mark.parametrize(
    ("question", "language", "kind", "yes", "no"),
    [
        ("What does the tart cost?", "en", "money", "It costs 4 pounds.", "It has 4 layers."),
        ("Was kostet der Eintritt?", "de", "money", "Er kostet 4 Euro.", "Er gilt 4 Tage."),
        ("How heavy is the drill?", "en", "weight", "It weighs 4 kg.", "It costs 4 euros."),
        ("How much memory has it?", "en", "size", "It has 2 GB.", "It has a lag of 940 s."),
        ("What is the phone number?", "en", "phone", "Call 555 0199.", "Call at 8."),
        ("What colour is the boat?", "en", "colour", "A red boat came.", "A post boat came."),
        ("When is it closed?", "en", "time", "It is closed on Mondays.", "It is closed."),
        ("Who sold the drill to Bob?", "en", "person", "Then Ann Lee came.", "Then Bob came."),
        (
            "How many steps has it?",
            "en",
            "count",
            "It has 38 steps.",
            "In 38 long years of rain no steps broke.",
        ),
    ],
)
def test_a_sentence_holds_the_kind_of_answer_that_is_wanted(
    question: str, language: str, kind: str, yes: str, no: str
) -> None:
    want = wanted(question, language)
    assert want.kind == kind
    assert holds(yes, want, language) == 1.0
    assert holds(no, want, language) == -1.0


def test_what_is_counted_may_have_another_name() -> None:
    assert holds("It has 38 stairs.", wanted("How many steps has it?")) == 0.0


def test_words_that_only_ask_are_not_looked_for() -> None:
    assert asked_terms("What does it cost to bring my dog?") == ["bring", "dog"]
    assert asked_terms("What does it cost?") == ["cost"]  # there is nothing else
    assert asked_terms("电饭煲的功率是多少？", "zh") == ["电饭", "饭煲", "功率"]
