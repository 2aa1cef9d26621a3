"""BERT's normalizer, words and pieces against `tokenizers`."""

from __future__ import annotations

import functools
import json
import sys
import unicodedata
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import (
    StreamDecoder,
    Tokenizer,
    load_tokenizer_files,
    normalizers,
    pretokenizers,
)
from tokenizer_support import CORPUS, FUZZ, IMPLEMENTATIONS, texts, word_piece

CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
NEWER_DECOMPOSITION = "\U00011938"  # Python composes and decomposes it, the wheel does not


@functools.cache
def loaded(lowercase: bool, implementation: Any) -> Tokenizer:
    return load_tokenizer_files({"tokenizer.json": word_piece(lowercase)}, implementation)


@functools.cache
def oracle(lowercase: bool) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(word_piece(lowercase))
    reference.no_padding()
    reference.no_truncation()
    return reference


@pytest.mark.parametrize("lowercase", [True, False])
@settings(FUZZ, max_examples=100)
@given(text=texts)
@example(text="\n".join(CORPUS))
@example(text="x" * 101 + " [CLS]don't[MASK] ##ing 東京, Ängström!")
def test_both_implementations_equal_tokenizers(lowercase: bool, text: str) -> None:
    expected = oracle(lowercase).encode(text)
    for implementation in IMPLEMENTATIONS:
        ours = loaded(lowercase, implementation)
        assert ours.encode(text, parse_special=True, add_special_tokens=True) == expected.ids
        ordinary = ours.encode(text)
        assert ordinary == loaded(lowercase, "tokenizers").encode(text)
        for skip in (False, True):
            decoded = oracle(lowercase).decode(expected.ids, skip_special_tokens=skip)
            assert ours.decode(expected.ids, skip_special_tokens=skip) == decoded
            stream = StreamDecoder(ours, skip_special_tokens=skip)
            pieces = [stream.push(id_) for id_ in expected.ids]
            assert "".join(pieces) + stream.flush() == decoded


@pytest.mark.parametrize(
    "options",
    [
        {"lowercase": False},
        {"lowercase": False, "strip_accents": True},
        {"lowercase": False, "clean_text": False, "handle_chinese_chars": False},
    ],
)
def test_every_character_is_normalized_as_in_the_wheel(options: dict[str, bool]) -> None:
    theirs = tokenizers.normalizers.BertNormalizer(**options)
    node = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, **options}
    ours = normalizers.build({"type": "BertNormalizer", **node})
    assert ours is not None
    differing = [c for c in CHARACTERS if theirs.normalize_str(f"a{c}b") != ours(f"a{c}b")]
    assert [c for c in differing if c != NEWER_DECOMPOSITION] == []


def test_case_follows_the_wheel_where_python_knows_the_character() -> None:
    theirs = tokenizers.normalizers.BertNormalizer(strip_accents=False)
    ours = normalizers.build({"type": "BertNormalizer", "strip_accents": False})
    assert ours is not None
    known = [c for c in CHARACTERS if unicodedata.category(c) != "Cn"]
    differing = [c for c in known if theirs.normalize_str(f"a{c}b") != ours(f"a{c}b")]
    assert all(unicodedata.category(c)[0] == "L" for c in differing)  # its pair is newer
    assert len(differing) < 10


def test_every_character_is_split_as_in_the_wheel() -> None:
    theirs = tokenizers.pre_tokenizers.BertPreTokenizer()
    ours = pretokenizers.build({"type": "BertPreTokenizer"})
    for c in CHARACTERS:
        expected = [word for word, _ in theirs.pre_tokenize_str(f"a{c}b")]
        assert ours([f"a{c}b"], True) == expected, hex(ord(c))


def test_a_vocabulary_without_the_unknown_token_is_refused() -> None:
    whole = json.loads(word_piece())
    whole["model"]["unk_token"] = "[NONE]"
    with pytest.raises(TokenizerError, match=r"'\[NONE\]' is not in model.vocab"):
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "python")
