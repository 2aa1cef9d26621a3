"""Version 3 of model.slm: programs that do not hold together are errors that say why."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from program_cases import CASES, program
from program_support import HIDDEN, Operation, Program, mutations, records

from pocketslm.errors import BackendError, BundleError, ContextOverflowError, UsageError
from pocketslm.runtime.backends.native import NativeModel
from pocketslm.runtime.ops.ids import ATTEND, BUFFER, CODE, ROLE, STATE

MUTATIONS = 12_000
TOKENS = np.arange(9)


def first(made: Program, code: str) -> Operation:
    return next(op for op in made.operations if op.code == code)


def edit(code: str, **changes: object) -> Callable[[Program], None]:
    """Sets fields of the first operation of that code; ``sizes_2=3`` sets an element."""

    def change(made: Program) -> None:
        op = first(made, code)
        for name, value in changes.items():
            field, _, index = name.partition("_")
            if index:
                values = getattr(op, field)
                values.extend([None if field == "sections" else 0] * (int(index) + 1 - len(values)))
                values[int(index)] = value
            else:
                setattr(op, field, value)

    return change


def poison(code: str, section: int) -> Callable[[Program], None]:
    def change(made: Program) -> None:
        tensor = made.tensors[str(first(made, code).sections[section])]
        assert isinstance(tensor, np.ndarray)
        tensor.flat[-1] = np.inf

    return change


def unused(made: Program) -> None:
    made.vector(HIDDEN)


def swapped(made: Program) -> None:
    made.operations[1], made.operations[2] = made.operations[2], made.operations[1]


def headless(made: Program) -> None:
    made.operations.pop()


def two_heads(made: Program) -> None:
    made.operations.append(made.operations[-1])


def undeclared(made: Program) -> None:
    made.states.pop()


def not_stored(made: Program) -> None:
    made.states.append((STATE["kv"], 2, 16, 0))


def stored_twice(made: Program) -> None:
    attends = [op for op in made.operations if op.code == "attend"]
    attends[1].sizes[0] = attends[0].sizes[0]


def state(number: int, *sizes: int) -> Callable[[Program], None]:
    def change(made: Program) -> None:
        made.states[number] = sizes  # type: ignore[assignment]

    return change


NAN = float("nan")
FAULTS: list[tuple[str, Callable[[Program], None], str]] = [
    ("llama", headless, "ends with head"),
    ("llama", two_heads, "ends with head"),
    ("llama", swapped, r"operation 1 \(attend, layer 0\): .* nothing has filled"),
    ("llama", unused, r"role 20, layer 0 \(number \d+\) is used by no operation"),
    ("llama", edit("attend", sizes_0=7), "state that is not declared"),
    ("llama", undeclared, "state that is not declared"),
    ("llama", not_stored, "state 2 is declared, but nothing stores it"),
    ("llama", stored_twice, "another operation's too"),
    ("llama", state(0, STATE["conv"], 64, 3, 0), "of another kind"),
    ("llama", state(0, STATE["kv"], 2, 16, 9), "other sizes"),
    ("llama", state(0, 9, 2, 16, 0), "kind 9, unknown here: the file needs a newer pocketslm"),
    ("llama", state(0, STATE["kv"], 2, 24, 0), "out of range"),
    ("lfm", state(0, STATE["conv"], 64, 1, 0), "out of range"),
    ("llama", edit("attend", sizes_1=3), "multiple of kv_heads"),
    ("llama", edit("attend", sizes_1=8), "query has another width"),
    ("llama", edit("attend", sizes_3=24), "multiple of 16"),
    ("llama", edit("attend", sizes_4=18), "rope_dim"),
    ("llama", edit("attend", sizes_4=8), "a vector of 4"),
    ("llama", edit("attend", sections_0=None), "go together"),
    ("llama", edit("attend", sizes_5=2**25), "window"),
    ("llama", edit("attend", sizes_6=4), "temperature and its step"),
    ("llama", edit("attend", sizes_7=1), "size that it has no use for"),
    ("llama", edit("attend", flags=8), "flag is unknown here: .* newer"),
    ("llama", edit("attend", flags=ATTEND["norm_after_rope"]), "without a norm"),
    ("llama", edit("attend", flags=ATTEND["reads_only"]), "nothing has stored yet"),
    ("llama", edit("attend", numbers_0=0.0), "factor is 0"),
    ("llama", edit("attend", numbers_0=NAN), "not finite"),
    ("llama", edit("attend", numbers_1=-1.0), "score cap is negative"),
    ("llama", edit("attend", numbers_2=2.0), "eps"),
    ("llama", edit("attend", norm="rms"), "norm that it has no use for"),
    ("llama", edit("project", numbers_0=-1.0), "eps"),
    ("llama", edit("project", numbers_1=1.0), "number that it has no use for"),
    ("llama", edit("project", flags=1), "flag is unknown"),
    ("llama", edit("project", norm="none"), "weight of no norm"),
    ("llama", edit("project", layer=4), "fewer layers"),
    ("llama", edit("project", sections_2=None), "required section"),
    ("llama", edit("project", sections_3=None), "the first ones or none"),
    ("llama", edit("project", sections_0="matrix 0"), "wrong kind or shape"),
    ("llama", edit("project_add", sizes_0=BUFFER["query"]), "attended or hidden"),
    ("llama", edit("project_add", sizes_0=BUFFER["hidden"]), "nothing has filled"),
    ("llama", edit("project_add", numbers_0=0.0), "factor is 0"),
    (
        "llama",
        edit("project_add", sections_0="matrix 0"),
        "wrong shape: 100 x 64, expected 64 x 64",
    ),
    ("llama", edit("gated", sizes_0=5), "activation is unknown here: .* newer"),
    ("llama", edit("gated", sections_3="matrix 0"), "multiple of 32"),
    ("llama", edit("head", numbers_1=-1.0), "negative"),
    ("llama", edit("head", sections_2="rotary 16 1000.0"), "is not a matrix"),
    ("llama", edit("embed", sections_0=None), "required section"),
    ("llama", edit("embed", numbers_0=0.0), "factor is 0"),
    ("llama", poison("project", 0), "not finite"),
    ("llama", poison("attend", 0), "not finite"),
    ("bert", poison("project", 5), "not finite"),
    ("bert", edit("norm", sizes_0=6), "buffer is unknown here: .* newer"),
    ("bert", edit("norm", sizes_1=32), "another width"),
    ("bert", edit("norm", sizes_2=24), "does not divide"),
    ("bert", edit("norm", norm="none"), "no norm"),
    ("bert", edit("norm", norm="rms"), "only a layer norm has a bias"),
    ("bert", edit("head", numbers_2=1.0), "nothing to scale"),
    ("lfm", poison("short_conv", 0), "not finite"),
    ("lfm", edit("short_conv", sizes_2=4), "other sizes"),
    ("lfm", edit("short_conv", sections_0=None), "required section"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAULTS)
def test_named_faults(
    name: str, change: Callable[[Program], None], message: str, tmp_path: Path
) -> None:
    made = program(name)
    NativeModel(made.write(tmp_path / "good.slm"))
    change(made)
    with pytest.raises(BundleError, match=message) as caught:
        NativeModel(made.write(tmp_path / "bad.slm"))
    assert "\n" not in str(caught.value)
    assert "invalid model.slm" in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, struct.pack("<H", max(CODE.values()) + 1), "has code 9, .* needs a newer pocketslm"),
        (2, struct.pack("<H", 3), "norm is unknown here: .* newer"),
        (12, struct.pack("<I", 5000), "names section 5000"),
        (24, struct.pack("<I", 0), "section that it has no use for"),
        (116, struct.pack("<I", 1), "reserved"),
    ],
)
def test_faulty_records(offset: int, value: bytes, message: str, tmp_path: Path) -> None:
    content = bytearray(program("llama").content())
    place = records(bytes(content), "program")[0] + offset
    content[place : place + len(value)] = value
    (tmp_path / "m.slm").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        NativeModel(tmp_path / "m.slm")


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_learned_positions_are_finite(dtype: str, tmp_path: Path) -> None:
    made = program("bert")
    name = str(first(made, "embed").sections[1])
    positions = np.asarray(made.tensors[name]).astype(dtype)
    positions[77, 5] = 1234.5
    made.tensors[name] = positions
    NativeModel(made.write(tmp_path / "m.slm"))
    marker, infinity = (np.array([value], dtype).tobytes() for value in (1234.5, np.inf))
    content = made.content()
    assert content.count(marker) == 1
    (tmp_path / "m.slm").write_bytes(content.replace(marker, infinity))
    with pytest.raises(BundleError, match="positions hold a value that is not finite"):
        NativeModel(tmp_path / "m.slm")


def test_a_program_is_there_once_and_whole(tmp_path: Path) -> None:
    content = program("llama").content()
    count = struct.unpack_from("<I", content, 12)[0]
    entries = [128 + 32 * i for i in range(count)]
    roles = [struct.unpack_from("<H", content, at)[0] for at in entries]
    at = entries[roles.index(ROLE["program"])]
    for change, message in (
        (struct.pack("<H", ROLE["chat"]), "program is missing"),
        (struct.pack("<H", ROLE["states"]), "appears twice"),
        (struct.pack("<HH", ROLE["program"], 16), "wrong kind"),
    ):
        (tmp_path / "m.slm").write_bytes(content[:at] + change + content[at + len(change) :])
        with pytest.raises(BundleError, match=message):
            NativeModel(tmp_path / "m.slm")
    size = struct.unpack_from("<Q", content, at + 24)[0]
    for cut in (1, 128, size - 128, size):
        changed = bytearray(content)
        struct.pack_into("<Q", changed, at + 24, size - cut)
        (tmp_path / "m.slm").write_bytes(changed)
        with pytest.raises(BundleError):
            NativeModel(tmp_path / "m.slm")


@pytest.mark.parametrize("name", ["gemma3", "lfm", "bert", "gemma4"])
def test_random_mutations_never_crash(name: str, tmp_path: Path) -> None:
    """What is still accepted must run; everything else is a BundleError."""
    assert name in CASES
    content = program(name, context=64).content()
    path, accepted = tmp_path / "m.slm", 0
    for changed in mutations(content, MUTATIONS // 4):
        path.write_bytes(changed)
        try:
            model = NativeModel(path)
        except BundleError:
            continue
        accepted += 1
        # A vocabulary or a context may be smaller now, and logits not finite.
        with contextlib.suppress(UsageError, ContextOverflowError, BackendError):
            session = model.session(threads=1, context=min(64, model.info.max_context))
            session.forward(TOKENS)
            session.forward(TOKENS[:1])
    assert 0 < accepted < MUTATIONS // 8
