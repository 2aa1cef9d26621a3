"""Unigram and its normalizer against `tokenizers`, which defines what is right."""

from __future__ import annotations

import base64
import json
import math
import random
import struct
import sys
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import load_tokenizer_files, normalizers
from tokenizer_support import (
    FUZZ,
    IMPLEMENTATIONS,
    SPECIAL,
    charsmap,
    document,
    hard_texts,
    loaded,
    metaspace,
    oracle,
    precompiled,
)

CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
# Keys and what may stand beside them in a cluster; no virama, see `charsmap`.
CLUSTERS = [
    *("A", "ﬁ", "™", "½", "ｶ", "ﾞ", "\u0958", "\u0344", "\r", "\n", "\r\n", "\x01", "\u200b", "é"),
    *("\u0301", "\u0323", "\ufe0f", "\u200d", "\u200c", "\u0600", "\u06dd", "\u0d4e", "\u0e33"),
    *("\u0915", "\u093c", "\u1100", "\u1161", "\u11a8", "가", "각", "🇩", "🇪", "👩", "👩‍👩‍👧‍👦"),
    *("\U0001f3fb", "\U000e0101", "\u2028", "\u00ad", "©", "x", " "),
]


@pytest.mark.parametrize("frame", ["{}", "A{}b", "{}A\u0301", "ﬁ{}", "\u0301{}\u0323"])
def test_every_character_is_normalized_as_in_the_wheel(frame: str) -> None:
    theirs = tokenizers.normalizers.Precompiled(charsmap("nmt_nfkc_cf"))
    ours = normalizers.build(precompiled("nmt_nfkc_cf"))
    assert ours is not None
    texts = [frame.format(character) for character in CHARACTERS]
    assert [text for text in texts if theirs.normalize_str(text) != ours(text)] == []


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nmt_nfkc_cf", "nfkc"])
def test_clusters_are_normalized_as_in_the_wheel(rules: str) -> None:
    theirs = tokenizers.normalizers.Precompiled(charsmap(rules))
    ours = normalizers.build(precompiled(rules))
    assert ours is not None
    rng = random.Random(3)
    texts = ["".join(rng.choices(CLUSTERS, k=rng.randint(1, 6))) for _ in range(20_000)]
    for text in [*texts, *hard_texts(500)]:
        assert ours(text) == theirs.normalize_str(text), repr(text)


PIECES = st.lists(
    st.tuples(st.text("ab▁é", min_size=1, max_size=4), st.integers(-4, 1)), min_size=1, max_size=12
)


@settings(FUZZ, max_examples=300)
@given(pieces=PIECES, text=st.text("abcé▁ ", max_size=12), fallback=st.booleans(), data=st.data())
def test_any_pieces_give_the_ids_of_the_wheel(
    pieces: list[tuple[str, int]], text: str, fallback: bool, data: st.DataObject
) -> None:
    """Ties, pieces that are listed twice, an unknown token that is a piece, bytes or not."""
    listed = [*pieces, *((f"<0x{byte:02X}>", -2) for byte in b"c\xc3\xa9" if fallback)]
    unknown = data.draw(st.integers(0, len(listed) - 1))
    whole = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": metaspace("always", data.draw(st.booleans())),
        "post_processor": None,
        "decoder": metaspace("always", True),
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": listed, "byte_fallback": fallback},
    }
    source = json.dumps(whole)
    expected = tokenizers.Tokenizer.from_str(source).encode(text).ids
    for implementation in IMPLEMENTATIONS:
        ours = load_tokenizer_files({"tokenizer.json": source}, implementation)  # type: ignore[arg-type]
        assert ours.encode(text) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("style", ["xlm-r", "t5", "unigram-bytes"])
def test_no_text_becomes_a_special_token_by_its_pieces(style: str, implementation: str) -> None:
    """All special tokens are pieces of the vocabulary, with the highest score that there is."""
    tokenizer = loaded(style, implementation)
    unknown = {tokenizer.token_id("<unk>")}
    wide = {ord(character): ord(character) + 0xFEE0 for character in "<|>/"}
    for special in SPECIAL:
        for text in (special, f"a {special}龥b", f"龥{special}龥", special.translate(wide)):
            ids = tokenizer.encode(text)
            assert not tokenizer.special_ids.intersection(ids) - unknown
            assert ids == oracle(style, False).encode(text, add_special_tokens=False).ids
    assert tokenizer.token_id("<s>") in tokenizer.encode("<s>", parse_special=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": [], "unk_id": 0}, "unk_id is 0"),
        ({"vocab": {"a": 0}, "unk_id": 0}, "vocab is dict; expected list"),
        ({"vocab": [["a", 0.0], ["b"]], "unk_id": 0}, r"vocab\[1\] is"),
        ({"vocab": [[7, 0.0]], "unk_id": 0}, r"vocab\[0\] is"),
        ({"vocab": [["a", "b"]], "unk_id": 0}, "'a' the score b"),
        ({"vocab": [["a", True]], "unk_id": 0}, "the score True"),
        ({"vocab": [["a", math.nan]], "unk_id": 0}, "the score nan"),
        ({"vocab": [["a", -math.inf]], "unk_id": 0}, "the score -inf"),
        ({"vocab": [["a", 10**400]], "unk_id": 0}, "the score 1000"),
        ({"vocab": [["a", 0.0]], "unk_id": 1}, "unk_id is 1; expected"),
        ({"vocab": [["a", 0.0]], "unk_id": -1}, "unk_id is -1; expected"),
        ({"vocab": [["a", 0.0]], "unk_id": None}, "unk_id is NoneType"),
        ({"vocab": [["a" * 513, 0.0]], "unk_id": 0}, "of 513 characters"),
    ],
)
def test_hostile_vocabularies_are_errors(change: dict[str, Any], message: str) -> None:
    whole = json.loads(document("xlm-r")) | {"added_tokens": []}
    whole["model"] |= change
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "python")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(";") == 2


def table(units: list[int], texts: bytes = b"x\0") -> bytes:
    padded = [*units, *[0] * (-len(units) % 256)]
    return struct.pack(f"<{1 + len(padded)}I", 4 * len(padded), *padded) + texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("*", "is not base64"),
        ("é", "is not base64"),
        (b"", "a trie of 0 bytes in 0"),
        (b"\0\0", "a trie of 0 bytes in 2"),
        (struct.pack("<I", 1 << 31) + bytes(64), "a trie of 2147483648 bytes in 68"),
        (struct.pack("<I", 1000) + bytes(1000), "a trie of 1000 bytes"),
        (table([256 << 10]), "out of its bounds at unit 0"),
        (table([1 << 31, 0, (1 << 9 | 1 << 10)]), "out of its bounds at unit 2"),
        (table([1 << 8 | 1 << 10, 1 << 31 | 3]), "out of its bounds at unit 0"),
        (table([1 << 8 | 1 << 10, 1 << 31 | 1], "é\0".encode()), "out of its bounds at unit 0"),
        (table([0], b"\xff"), "not UTF-8"),
        (table([0], b"x" * 19), "a replacement of more than 18 characters"),
    ],
)
def test_hostile_tables_are_errors(content: Any, message: str) -> None:
    text = content if isinstance(content, str) else base64.b64encode(content).decode()
    node = {"type": "Precompiled", "precompiled_charsmap": text}
    whole = json.loads(document("xlm-r")) | {"normalizer": node}
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(TokenizerError, match=message) as caught:
            load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, implementation)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(";") == 2


def test_a_table_that_is_a_circle_ends() -> None:
    """Every unit leads to itself, so that any byte does."""
    units = [label | at << 10 for at, label in enumerate(range(256))]
    node = base64.b64encode(table(units)).decode()
    normalize = normalizers.build({"type": "Precompiled", "precompiled_charsmap": node})
    assert normalize is not None
    assert normalize("aé🙂\u0301" * 100) == "aé🙂\u0301" * 100
