"""The tokenizers of real families, held against `tokenizers` and llama.cpp."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizer_families as families
import tokenizers

from pocketslm.models.catalog import fetch
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.tokenizer_files import _PRE, tokenizer_files_from_gguf
from pocketslm.runtime.tokenizer import Tokenizer, load_tokenizer_files
from tokenizer_support import hard_texts, trained

IMPLEMENTATIONS = ("tokenizers", "python")
MIXED = 600  # texts put together at random, beside the fixed ones


def loaded(text: str, implementation: Any) -> Tokenizer:
    return load_tokenizer_files({"tokenizer.json": text}, implementation)


@contextlib.contextmanager
def llama_cpp_vocabulary(path: Path) -> Iterator[Any]:
    """llama.cpp's reader of a GGUF file's vocabulary: text to ids."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield lambda text, special: theirs.tokenize(text.encode(), add_bos=False, special=special)
    theirs.close()


@pytest.mark.real
@pytest.mark.parametrize("name", families.FILES)
def test_real_files_equal_tokenizers(name: str) -> None:
    text = families.tokenizer_json(name)
    reference = tokenizers.Tokenizer.from_str(text)
    reference.no_truncation()
    reference.no_padding()
    wheel, own = (loaded(text, implementation) for implementation in IMPLEMENTATIONS)
    for hard in hard_texts(MIXED):
        expected = reference.encode(hard).ids
        for ours in (wheel, own):
            assert ours.encode(hard, parse_special=True, add_special_tokens=True) == expected, hard
        assert own.encode(hard) == wheel.encode(hard), hard
        for skip in (False, True):
            decoded = reference.decode(expected, skip_special_tokens=skip)
            if "\ufffd" not in decoded:  # the wheel replaces each byte of a run that is not UTF-8
                assert own.decode(expected, skip_special_tokens=skip) == decoded


@pytest.mark.real
def test_gemma_out_of_gguf_equals_its_own_file_and_llama_cpp() -> None:
    """Of Gemma's GGUF, the words come from scores, and runs of spaces and lines are tokens."""
    path = fetch("gemma3-270m")
    text = tokenizer_files_from_gguf(GGUFFile(path).metadata)["tokenizer.json"]
    own = loaded(text, "python")
    original = loaded(families.tokenizer_json("gemma3"), "tokenizers")
    runs = [sign * count + "the" for sign in " \n" for count in range(1, 70)]
    with llama_cpp_vocabulary(path) as theirs:
        for hard in [*hard_texts(MIXED), *runs]:
            # "\u2581" is a space to its own file and a sign to llama.cpp; "</s>", an HTML tag
            # here, is special to llama.cpp, and "\x00" ends its texts.
            if any(sign in hard for sign in ("\u2581", "</s>", "\x00")):
                continue
            for special in (False, True):
                ids = own.encode(hard, parse_special=special)
                assert ids == original.encode(hard, parse_special=special), hard
                assert ids == theirs(hard, special), hard


@pytest.mark.parametrize("pre", sorted(_PRE))
def test_every_pre_tokenizer_equals_llama_cpp(pre: str, tmp_path: Path) -> None:
    path = families.write_vocabulary(tmp_path / "v.gguf", trained(False), model="gpt2", pre=pre)
    files = tokenizer_files_from_gguf(GGUFFile(path).metadata)
    own = load_tokenizer_files(files, "python")
    cased = pre in ("gpt-4o", "llama4", "kanana2", "tekken")
    compared = 0
    with llama_cpp_vocabulary(path) as theirs:
        for hard in hard_texts(MIXED):
            # llama.cpp does not normalize, looks for added tokens inside special ones, knows the
            # case of ASCII letters alone and no marks in cased words, and ends its texts at "\x00".
            kinds = {unicodedata.category(sign) for sign in hard if not sign.isascii()}
            beyond = cased and kinds & {"Lu", "Ll", "Lt", "Mn", "Mc", "Me"}
            if beyond or "im_end" in hard or "\x00" in hard:
                continue
            compared += 1
            normal = unicodedata.normalize("NFC", hard)
            assert own.encode(hard) == theirs(normal if _PRE[pre].nfc else hard, False), hard
    assert compared > MIXED / 3


@pytest.mark.real
def test_gemma4_form_equals_llama_cpp(tmp_path: Path) -> None:
    """Gemma 4's GGUF form carries merges over characters; Gemma 3's own stand in for them."""
    document = json.loads(families.tokenizer_json("gemma3"))
    path = families.write_vocabulary(tmp_path / "v.gguf", document, model="gemma4")
    files = tokenizer_files_from_gguf(GGUFFile(path).metadata)
    wheel, own = (load_tokenizer_files(files, name) for name in IMPLEMENTATIONS)  # type: ignore[arg-type]
    original = loaded(json.dumps(document), "tokenizers")
    assert own.encode("a", add_special_tokens=True)[0] == own.bos_token_id
    with llama_cpp_vocabulary(path) as theirs:
        for hard in hard_texts(MIXED):
            if any(sign in hard for sign in ("\u2581", "</s>", "\x00")):
                continue
            ids = own.encode(hard)
            assert ids == wheel.encode(hard) == original.encode(hard), hard
            assert ids == theirs(hard, False), hard
