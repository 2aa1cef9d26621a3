"""Several contexts of one session: the bits of each alone, and what the C border refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program_cases import DECODERS, program
from program_support import VOCABULARY

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.backends import Part, Penalty, Wanted
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import Entry, ErrorText, isa_names

SLOTS = 3
# By step and slot; 0: nothing. Prompts beside single tokens, more than a batch, and than a ring.
COUNTS = ((270, 5, 1), (1, 1, 1), (1, 0, 30), (1, 17, 1), (9, 1, 1), (1, 1, 0), (30, 1, 1))
RNG = np.random.default_rng(7)
TOKENS = RNG.integers(0, VOCABULARY, (SLOTS, 330))


def pieces(counts: tuple[tuple[int, ...], ...]) -> list[list[tuple[int, np.ndarray]]]:
    """Of each step the slots that take part, with their tokens."""
    done, found = [0] * SLOTS, []
    for step in counts:
        found.append([])
        for slot, count in enumerate(step):
            if count:
                found[-1].append((slot, TOKENS[slot, done[slot] : done[slot] + count]))
                done[slot] += count
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_a_slot_gets_the_bits_that_it_gets_alone(name: str, tmp_path: Path) -> None:
    model = NativeModel(program(name).write(tmp_path / "m.slm"))
    for kv_type in ("fp16", "int8"):
        alone = [model.session(threads=1, kv_type=kv_type) for _ in range(SLOTS)]
        together = model.session(threads=2, kv_type=kv_type, slots=SLOTS)
        for step in pieces(COUNTS):
            found = together.forward_slots(
                [Part(slot, tokens, Wanted.LOGITS) for slot, tokens in step]
            )
            for (slot, tokens), one in zip(step, found, strict=True):
                np.testing.assert_array_equal(one.logits, alone[slot].forward(tokens)[0])
        assert [slot.length for slot in together.slots] == [one.length for one in alone]
        # A slot is a session of its own, too.
        for slot, one in zip(together.slots, alone, strict=True):
            assert slot.rewind_limit == one.rewind_limit
            assert slot.save() == one.save()
            slot.truncate(0)
            one.truncate(0)
            np.testing.assert_array_equal(slot.forward([1, 2]), one.forward([1, 2]))


@pytest.mark.parametrize("isa", isa_names())
def test_what_is_wanted(isa: str, chat_model: Path) -> None:
    """Of a head that is screened: the best, the highest and all logits, alike and mixed."""
    model = NativeModel(chat_model)
    steps = pieces(((20, 3, 1), (1, 1, 1), (2, 1, 1)))
    mixed = (Wanted.NEXT, Wanted.TOP, Wanted.LOGITS, Wanted.NOTHING)
    for wants in ([mixed[0]] * 4, [mixed[1]] * 4, mixed, (*mixed[1:], mixed[0])):
        alone = [model.session(threads=1, isa=isa) for _ in range(SLOTS)]
        together = model.session(threads=2, isa=isa, slots=SLOTS)
        for step in steps:
            parts = [
                Part(slot, ids, wants[slot], 7 * (wants[slot] == Wanted.TOP)) for slot, ids in step
            ]
            for (slot, ids), found in zip(step, together.forward_slots(parts), strict=True):
                session, wanted = alone[slot], wants[slot]
                if wanted == Wanted.NOTHING:
                    session.forward(ids)
                    assert found == (None, None, None)
                elif wanted == Wanted.LOGITS:
                    np.testing.assert_array_equal(found.logits, session.forward(ids)[0])
                elif wanted == Wanted.NEXT:
                    assert found.tokens == session.forward_greedy(ids)
                else:
                    best, logits, total = session.forward_top(ids, 7)
                    np.testing.assert_array_equal(found.tokens, best)
                    np.testing.assert_array_equal(found.logits, logits)
                    assert found.log_total == pytest.approx(total, abs=1e-5)


def lengths(session: NativeSession) -> list[int]:
    return [slot.length for slot in session.slots]


def test_what_the_border_refuses(chat_model: Path) -> None:
    model = NativeModel(chat_model)
    session = model.session(threads=2, context=40, slots=2)
    session.forward_slots([Part(0, [1, 2], Wanted.NOTHING), Part(1, [3], Wanted.NEXT)])
    tokens, room = np.arange(40, dtype=np.int32), np.zeros(model.info.vocab_size, np.float32)
    good = {"tokens": tokens.ctypes.data, "count": 2, "best": room.ctypes.data}
    good |= {"logits": room.ctypes.data, "wanted": 2, "room": 1, "following": 1}
    error = ErrorText()

    def forward(*changes: dict[str, Any], count: int | None = None) -> None:
        entries = (Entry * len(changes))(*(Entry(**good | change) for change in changes))
        size = len(changes) if count is None else count
        handle = session._shared.handle
        error.check(session._library.pslm_forward_slots(handle, entries, size, error.argument))

    outside = np.array([1, model.info.vocab_size], np.int32)
    for changes, message in (
        ([{"slot": 2}], "slot 2 of 2"),
        ([{"slot": 1}, {"slot": 1}], "there twice"),
        ([{"tokens": None}], "null argument"),
        ([{"count": 0}], "no tokens"),
        ([{}, {"slot": 1, "count": 40}], "do not fit the context of 40"),
        ([{}, {"slot": 1, "tokens": outside.ctypes.data}], "outside the vocabulary"),
        ([{"wanted": 4}], "unknown choice"),
        ([{"best": None}], "slot 0: null"),
        ([{"logits": None}], "slot 0: null"),
        ([{"room": 0}], "the 0 most probable"),
        ([{"room": 1 << 40}], "most probable"),
        ([{"wanted": 3, "room": 5}], "too small"),
        ([{"wanted": 3, "room": model.info.vocab_size, "following": 2}], "too small"),
        ([{"wanted": 1, "following": 2}], "too small"),
        ([{"following": 0}], "what follows 0 tokens of 2"),
        ([{"wanted": 1, "following": 3}], "what follows 3 tokens of 2"),
        ([{"following": 2}], "what follows 2 tokens of 2"),
    ):
        with pytest.raises((UsageError, ContextOverflowError), match=message):
            forward(*changes)
        assert lengths(session) == [2, 1]
    with pytest.raises(UsageError, match="no entries"):
        forward({}, count=0)
    library = session._library
    assert library.pslm_forward_slots(None, None, 1, error.argument) == 1
    assert library.pslm_use_slot(session._shared.handle, 2, error.argument) == 1
    forward({"slot": 1}, {})
    assert lengths(session) == [4, 3]
    for slots in (0, 17):
        with pytest.raises(UsageError, match=f"{slots} slots, expected 1 to 16"):
            model.session(slots=slots)
    handle = ctypes.c_void_p()
    assert library.pslm_session_open_slots(model._handle, None, 2, handle, error.argument) == 1


def test_memory_of_an_unused_slot_is_not_touched(chat_model: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = NativeModel(chat_model)
    session = model.session(threads=1, slots=16)
    count = session.context - session.context % 16
    for _ in range(2):
        session.truncate(0)
        session.forward(np.arange(count) % 90)
    before = resident()
    for slot in session.slots[1:]:
        slot.forward(np.arange(count) % 90)
    assert resident() - before > session.kv_bytes / 2


@pytest.mark.parametrize("name", DECODERS)
def test_a_penalty_is_for_one_slot(name: str, tmp_path: Path) -> None:
    """Also where it makes logits take their factor and cap, which others do without."""
    model = NativeModel(program(name).write(tmp_path / "m.slm"))
    alone = [model.session(threads=1) for _ in range(SLOTS)]
    together = model.session(threads=2, slots=SLOTS)
    for step in pieces(((20, 3, 1), (1, 1, 1), (2, 1, 1))):
        best = [int(model.session(threads=1).forward(ids)[0].argmax()) for _, ids in step]
        penalties = [None, Penalty(1.3, np.array(best)), Penalty(100.0, TOKENS[2, :30])]
        parts = [Part(slot, ids, Wanted.NEXT, penalty=penalties[slot]) for slot, ids in step]
        for (slot, ids), found in zip(step, together.forward_slots(parts), strict=True):
            assert found.tokens == alone[slot].forward_greedy(ids, 1, penalties[slot])
