"""The model's own tokenizer through the library, against `tokenizers` and the Python readers."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_support
import pytest

from pocketslm.errors import BundleError, TokenizerError, UsageError
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.runtime.backends.native_library import ErrorText, load_library
from pocketslm.runtime.backends.native_tokenizer import NativeTokenizer
from pocketslm.runtime.tokenizer import load_tokenizer_files
from tokenizer_support import document, hard_texts, loaded, word_piece


def opened(style: str, folder: Path) -> NativeTokenizer:
    packed, reason = pack_tokenizer(document(style))
    assert packed is not None, reason
    return NativeTokenizer(native_support.model_with_tokenizer(folder, packed))


@pytest.mark.parametrize("style", ["smollm", "qwen2", "gpt4o", "llama2", "gemma"])
def test_ids_and_text_equal_the_python_reader(style: str, tmp_path: Path) -> None:
    native, python = opened(style, tmp_path), loaded(style, "python")
    for text in hard_texts(300):
        for special in (False, True):
            ids = python.encode(text, parse_special=special, add_special_tokens=special)
            assert native.encode(text, parse_special=special, add_special_tokens=special) == ids
            data = native.decode(ids)
            assert data.decode("utf-8", "replace") == python.decode(ids)
            parts = [native.decode([id_], goes_on=at > 0) for at, id_ in enumerate(ids)]
            kept = [id_ for id_ in ids if id_ not in python.special_ids]
            if kept[:1] == ids[:1]:
                assert b"".join(parts) == data
            assert native.decode(ids, goes_on=True) == b"".join(map(python.token_bytes, kept))


def test_word_pieces_equal_the_python_reader(tmp_path: Path) -> None:
    packed, reason = pack_tokenizer(word_piece())
    assert packed is not None, reason
    native = NativeTokenizer(native_support.model_with_tokenizer(tmp_path, packed))
    python = load_tokenizer_files({"tokenizer.json": word_piece()}, "python")
    for text in hard_texts(300):
        for special in (False, True):
            ids = python.encode(text, parse_special=special, add_special_tokens=special)
            assert native.encode(text, parse_special=special, add_special_tokens=special) == ids
    # Unlike the readers it writes no space away before a sign.
    assert native.decode(native.encode("The quick, lazy dog.")) == b"the quick , lazy dog ."


def test_several_threads_share_one(tmp_path: Path) -> None:
    native, texts = opened("llama3", tmp_path), hard_texts(200)
    expected = [native.encode(text) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(native.encode, texts * 2)) == expected * 2


def test_what_cannot_be_encoded_is_said(tmp_path: Path) -> None:
    native = opened("llama3", tmp_path)
    assert native.encode("") == []
    assert native.decode([]) == b""
    with pytest.raises(TokenizerError, match="lone surrogate"):
        native.encode("\ud800")
    for wrong in (-1, 3002, 2**40):
        with pytest.raises(UsageError, match="outside the vocabulary of 3002"):
            native.decode([0, wrong])


@pytest.mark.parametrize(
    ("packed", "message"),
    [(None, "the model file has no tokenizer"), (b"\x09" * 64, "unknown version")],
)
def test_models_without_a_usable_tokenizer(
    packed: bytes | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        NativeTokenizer(native_support.model_with_tokenizer(tmp_path, packed))


def test_the_border_checks_its_arguments(tmp_path: Path) -> None:
    """Room that is too small is an error with nothing written; none at all asks for the size."""
    native, library = opened("qwen2", tmp_path), load_library()
    count, room = ctypes.c_size_t(), (ctypes.c_int32 * 4)(7, 7, 7, 7)
    handle, error = native._handle, ErrorText().argument

    def encode(text: bytes | None, flags: int, capacity: int, into: object = room) -> int:
        size = 5 if text is None else len(text)
        status: int = library.pslm_encode(
            handle, text, size, flags, into, capacity, ctypes.byref(count), error
        )
        return status

    text = b"12345"  # five tokens
    assert encode(text, 0, 0, None) == 0
    assert count.value == 5
    assert encode(text, 0, 4) == 1
    assert list(room) == [7, 7, 7, 7]
    assert encode(text[:-1], 0, 4) == 0
    assert room[3] != 7
    assert count.value == 4
    assert [encode(None, 0, 4), encode(text, 16, 4), encode(text, 0, 4, None)] == [1, 1, 1]
    assert [encode(text, 8, 4), encode(text, 2 | 8, 4), encode(text, 2 | 4, 4)] == [1, 1, 1]
    assert library.pslm_encode(None, text, 5, 0, room, 4, ctypes.byref(count), error) == 1
    assert library.pslm_decode(handle, room, 4, 1, None, 0, ctypes.byref(count), error) == 1
