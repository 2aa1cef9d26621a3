"""Unigram through the library: what its packed form refuses, and what the runner says to it."""

from __future__ import annotations

import math
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import native_support
import pytest
from native_runner import Runner
from native_support import running

from pocketslm.errors import BundleError, UsageError
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.runtime.backends.native_tokenizer import NativeTokenizer
from pocketslm.runtime.tokenizer import load_tokenizer
from tokenizer_support import document, hard_texts

HEADER = 12  # words
SIZE = 3002
Change = Callable[[bytearray], object]


@pytest.fixture(scope="module")
def packed() -> bytes:
    section, reason = pack_tokenizer(document("xlm-r"))
    assert section is not None
    assert "normalizes" in reason  # for the runner alone
    return section


def opened(folder: Path, section: bytes) -> NativeTokenizer:
    return NativeTokenizer(native_support.model_with_tokenizer(folder, section, SIZE))


def put(section: bytearray, word: int, *values: int) -> None:
    struct.pack_into(f"<{len(values)}I", section, 4 * word, *values)


def places(section: bytes) -> tuple[int, int, int]:
    """The words where the offsets, the index and the scores begin."""
    _, tokens, merges, indexed, added, prefix, suffix = struct.unpack_from("<7I", section)
    index = HEADER + tokens + 1 + 4 * merges
    return HEADER, index, index + indexed + 2 * added + prefix + suffix + 256


def score(value: float) -> Change:
    return lambda data: struct.pack_into("<d", data, 4 * places(data)[2], value)


def unknown_score(value: float) -> Change:
    indexed = struct.Struct("<I").unpack_from

    def change(data: bytearray) -> None:
        at = places(data)[2] + 2 * indexed(data, 12)[0]
        struct.pack_into("<d", data, 4 * at, value)

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "cut": (lambda data: data.__delitem__(slice(-1, None)), "wrong length"),
    "cut in its scores": (
        lambda data: data.__delitem__(slice(4 * places(data)[2] + 20, None)),
        "wrong length",
    ),
    "longer": (lambda data: data.extend(bytes(8)), "wrong length"),
    "without scores": (lambda data: put(data, 7, 4), "wrong length"),
    "an unknown kind": (lambda data: put(data, 7, 13), "wrong length or form"),
    "more pieces": (lambda data: put(data, 3, 2**32 - 1), "wrong length"),
    "an unknown token that is none": (lambda data: put(data, 9, SIZE), "unknown token"),
    "an offset beyond the text": (lambda data: put(data, places(data)[0] + 9, 2**31), "offsets"),
    "offsets that fall": (lambda data: put(data, places(data)[0] + 9, 0), "offsets"),
    "a piece that is none": (lambda data: put(data, places(data)[1], 2**31), "unknown token"),
    "not a number": (score(math.nan), "not finite"),
    "infinity": (score(-math.inf), "not finite"),
    "the score of the unknown": (unknown_score(math.nan), "not finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sections_are_errors(name: str, packed: bytes, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    data = bytearray(packed)
    change(data)
    assert data != packed
    with pytest.raises(BundleError, match=message):
        opened(tmp_path, bytes(data))


def test_an_empty_and_a_long_piece_are_errors(packed: bytes, tmp_path: Path) -> None:
    offsets, index, _ = places(packed)
    count = struct.unpack_from("<I", packed, 12)[0]
    indexed = struct.unpack_from(f"<{count}I", packed, 4 * index)
    last = max(indexed)
    end = struct.unpack_from("<I", packed, 4 * (offsets + last + 1))[0]
    empty, long = bytearray(packed), bytearray(packed)
    put(empty, offsets + last, end)
    for token in range(1, last + 1):
        put(long, offsets + token, 0)
    for data in (empty, long):
        with pytest.raises(BundleError, match="an empty or a long piece"):
            opened(tmp_path, bytes(data))


def test_pieces_out_of_order_are_no_harm(packed: bytes, tmp_path: Path) -> None:
    _, index, _ = places(packed)
    count = struct.unpack_from("<I", packed, 12)[0]
    tokens = list(struct.unpack_from(f"<{count}I", packed, 4 * index))
    random.Random(5).shuffle(tokens)
    data = bytearray(packed)
    put(data, index, *tokens)
    native = opened(tmp_path, bytes(data))
    for text in hard_texts(100):
        ids = native.encode(text, parse_special=True, normalized=True)
        assert all(0 <= id_ < native.size for id_ in ids)


def test_text_has_to_come_normalized(packed: bytes, tmp_path: Path) -> None:
    native = opened(tmp_path, packed)
    assert native.takes_normalized
    assert native.encode("", normalized=True) == []
    with pytest.raises(UsageError, match="takes normalized text alone"):
        native.encode("a")
    with pytest.raises(UsageError, match="neither goes on nor is normalized"):
        native.encode("a", add_special_tokens=True, normalized=True)
    section, _ = pack_tokenizer(document("llama3"))
    assert section is not None
    other = opened(tmp_path, section)
    assert not other.takes_normalized
    with pytest.raises(UsageError, match="normalizes texts itself"):
        other.encode("a", normalized=True)


@pytest.mark.parametrize("style", ["xlm-r", "t5"])
def test_a_long_text_takes_linear_time(style: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(document(style))
    section, _ = pack_tokenizer(document(style))
    assert section is not None
    tokenizer = load_tokenizer(tmp_path, packed=opened(tmp_path, section))
    start = time.perf_counter()
    for unit in ("ab cd ", "a", " ", "\n  ", "▁", "東A", "<|im_", "\x01", "A\u0301", "🙂"):
        tokenizer.encode(unit * (300_000 // len(unit)))
        assert time.perf_counter() - start < 60, unit  # a second; in quadratic time an hour


def test_the_runner_refuses_its_text(packed: bytes, runner_path: Path, tmp_path: Path) -> None:
    native_support.model_with_tokenizer(tmp_path, packed, SIZE)
    with running([str(runner_path)]) as runner:
        loaded = runner.ask(op="load", path=str(tmp_path / "model.slm"), threads=1, context=64)
        assert loaded["event"] == "loaded"
        assert loaded["tokenizer"] is False
        refused = runner.ask(op="encode", prompt="a")
        assert refused["event"] == "error"
        assert "normalizes text as the runner cannot; pass tokens" in refused["message"]
        assert _answers(runner)


def _answers(runner: Runner) -> bool:
    tokens, _, _ = runner.generate(tokens=[5, 6], max_tokens=3, ignore_eos=True)
    return len(tokens) == 3
