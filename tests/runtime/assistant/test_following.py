"""Questions that go on from the one before them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketslm.cli import main
from pocketslm.profiling.assistant import finished
from pocketslm.runtime.assistant.assistant import Assistant
from pocketslm.runtime.assistant.document import Block, make_source
from pocketslm.runtime.assistant.following import standing_alone
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.model import Model

STREET = "Parking in the yard costs 12 euros a day. In the street it costs 3 euros."
BRIDGE = "The bridge in Ostra was built by Ann Lee in 1932. It has a deck of oak.\n\n" + STREET


@pytest.mark.parametrize(
    ("before", "question", "language", "alone"),
    [
        ("When was Apollo 8 launched?", "And where?", "en", "Where? (Apollo 8 launched)"),
        ("When was Apollo 8 launched?", "Who led it?", "en", "Who led it? (Apollo 8)"),
        ("Where? (Apollo 8 launched)", "And why?", "en", "Why? (Apollo 8 launched)"),
        ("What does the arch cost?", "And the deck?", "en", "cost the deck?"),
        ("Wie groß ist die Wohnung?", "Und wo liegt sie?", "de", "Wo liegt sie? (Wohnung)"),
        ("Qui est le syndic ?", "Et où ?", "fr", "Où ? (syndic)"),
        ("¿Qué fianza se deja?", "¿Y cuándo?", "es", "Cuándo? (fianza deja)"),
        ("كم سعر الكشف العام؟", "ومتى؟", "ar", "متى؟ (سعر الكشف العام)"),
    ],
)
def test_a_question_takes_words_of_the_one_before_and_no_others(
    before: str, question: str, language: str, alone: str
) -> None:
    assert standing_alone(question, before, language) == alone


@pytest.mark.parametrize(
    ("before", "question"),
    [
        ("", "And when?"),  # nothing to go on from
        ("Is there a lift?", "What does it cost to bring my dog?"),  # "it" means nothing
        ("Is there a lift?", "Where is the key?"),
        ("Who is Elin?", "When did Tormod row his boat?"),  # "his" is Tormod's
        ("How long is the compressor covered?", "And what is excluded?"),
    ],
)
def test_a_question_that_stands_alone_stays_as_it_is(before: str, question: str) -> None:
    assert standing_alone(question, before, "en") == question


def test_an_answer_says_how_its_question_was_understood(
    tiny_bundle: Path, library: Library
) -> None:
    assistant = Assistant(Model.load(tiny_bundle, threads=1))
    document = library.add(make_source("bridge", "txt", [Block(p) for p in BRIDGE.split("\n\n")]))
    answer = finished(assistant.ask(document, "And when?", before="Who built the bridge in Ostra?"))
    assert (answer.request, answer.asked) == ("And when?", "When? (built bridge Ostra)")
    assert answer.found
    assert "1932" in answer.text
    alone = finished(assistant.ask(document, "And when?"))
    assert alone.asked == "And when?"
    assert not alone.found


def test_the_conversation_goes_on_in_a_later_command(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "bridge.md"
    note.write_text(BRIDGE)
    where = ["--library", str(tmp_path / "library.db"), "--json"]
    ask = ["doc", "ask", str(tiny_bundle), "-n", "4", *where]
    assert main(["doc", "add", str(note), *where]) == 0
    assert main([*ask, "How much is parking in the yard?", "And in the street?"]) == 0
    assert main([*ask, "--document", "1", "And when?"]) == 0
    said = capsys.readouterr().out
    both, (last,) = _two(said)
    assert [answer["asked"] for answer in both] == [
        "How much is parking in the yard?",
        "How much in the street?",
    ]
    assert last["asked"] == "When? (street)"


def _two(text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The two JSON documents of two commands."""
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(text.lstrip())
    second, _ = decoder.raw_decode(text.lstrip()[end:].lstrip())
    return first, second
