"""The tokenizer against `tokenizers`, which defines what is right."""

from __future__ import annotations

import functools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import (
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    load_tokenizer_files,
)
from tokenizer_support import (
    AWKWARD,
    BYTE_LEVEL,
    BYTE_STYLES,
    CONFIG,
    CORPUS,
    FALLBACK,
    FUZZ,
    IMPLEMENTATIONS,
    SPACE_TO_MARK,
    STRIP,
    STYLES,
    document,
    loaded,
    metaspace,
    oracle,
    sequence,
    split,
    texts,
)


@pytest.mark.real
def test_ten_thousand_lines_equal_tokenizers(smollm2_tokenizer: Path, lee_lines: list[str]) -> None:
    assert len(lee_lines) == 10_000
    reference = tokenizers.Tokenizer.from_file(str(smollm2_tokenizer / "tokenizer.json"))
    ours = load_tokenizer(smollm2_tokenizer, "python")
    expected = [e.ids for e in reference.encode_batch(lee_lines, add_special_tokens=False)]
    for line, ids in zip(lee_lines, expected, strict=True):
        assert ours.encode(line, parse_special=True) == ids
        assert ours.decode(ids, skip_special_tokens=False) == line


@pytest.mark.real
def test_the_python_reader_loads_a_49k_vocabulary_in_a_second(
    smollm2_tokenizer: Path,
) -> None:
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        assert load_tokenizer(smollm2_tokenizer, "python").vocab_size == 49152
        samples.append(time.perf_counter() - start)
    assert min(samples) < 1.0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("parse_special", [False, True])
@settings(FUZZ, max_examples=60)
@given(text=texts)
@example(text="<|im_end|><tool_call>im_end</s> <s>  x")
@example(text="".join(AWKWARD))
@example(text=" ".join(AWKWARD))
@example(text="\n".join(CORPUS))
def test_both_implementations_equal_tokenizers(style: str, parse_special: bool, text: str) -> None:
    expected = oracle(style, parse_special).encode(text, add_special_tokens=False).ids
    for implementation in IMPLEMENTATIONS:
        tokenizer = loaded(style, implementation)
        assert tokenizer.name == implementation
        assert tokenizer.encode(text, parse_special=parse_special) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("style", ["llama3", "llama2", "t5"])
def test_special_text_is_ordinary_text_unless_asked_for(style: str, implementation: str) -> None:
    tokenizer = loaded(style, implementation)
    ids = tokenizer.encode("a<|im_end|>b")
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer.token_id("<|im_end|>") in tokenizer.encode("a<|im_end|>b", parse_special=True)
    after = [2] if style == "t5" else []
    assert tokenizer.encode("a", add_special_tokens=True) == [1, *tokenizer.encode("a"), *after]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@settings(FUZZ, max_examples=60)
@given(
    text=st.lists(
        st.sampled_from(["<tool_call>", " ", "\n", "a", "_", ".", "é", "\u0301", "b c"])
    ).map("".join)
)
def test_added_token_flags_equal_tokenizers(flag: str, text: str) -> None:
    tokenizer, reference = flagged(flag)
    ids = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == reference.decode(ids)


@functools.cache
def flagged(flag: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    whole = json.loads(document("llama2"))
    whole["added_tokens"][-2][flag] = True
    text = json.dumps(whole)
    ours = load_tokenizer_files({"tokenizer.json": text}, "python")
    return ours, tokenizers.Tokenizer.from_str(text)


@pytest.mark.parametrize("style", ["smollm", "llama2", "unigram-bytes"])
def test_long_words_take_near_linear_time(style: str) -> None:
    tokenizer = load_tokenizer_files({"tokenizer.json": document(style)}, "python")

    def seconds(length: int) -> float:
        text = "".join(random.Random(length).choices("abcdefghij", k=length))
        start = time.process_time()
        tokenizer.encode(text)
        return time.process_time() - start

    seconds(1000)
    short, long = (min(seconds(count) for _ in range(3)) for count in (10_000, 80_000))
    assert long < 8 * short * 4  # quadratic time would be 64 times as long


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("style", STYLES)
@settings(FUZZ, max_examples=40)
@given(data=st.data(), skip=st.booleans())
def test_streaming_equals_decoding(
    style: str, implementation: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = loaded(style, implementation)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(id_) for id_ in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + stream.flush() == whole
    # A flushed stream starts anew.
    assert "".join([stream.push(id_) for id_ in ids]) + stream.flush() == whole
    if style in BYTE_STYLES:
        assert whole == oracle(style, True).decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", STYLES)
@settings(FUZZ, max_examples=40)
@given(text=texts)
def test_decoding_encoded_text_equals_tokenizers(style: str, text: str) -> None:
    reference = oracle(style, True)
    ids = reference.encode(text).ids
    for skip in (False, True):
        expected = reference.decode(ids, skip_special_tokens=skip)
        assert loaded(style, "python").decode(ids, skip_special_tokens=skip) == expected


def test_a_stream_never_emits_part_of_a_character() -> None:
    for style in ("smollm", "llama2"):
        tokenizer = loaded(style, "python")
        ids = tokenizer.encode("日本 👩‍👩‍👧‍👦 x")
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(id_) for id_ in ids]
        assert "" in pieces
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == "日本 👩‍👩‍👧‍👦 x"
        first = tokenizer.encode("🙈")[:-1]  # its bytes are tokens
        assert "".join(map(stream.push, first)).strip() == ""
        assert "\ufffd" in stream.flush()


@pytest.mark.parametrize("style", ["smollm", "llama2", "gemma"])
def test_token_bytes_are_exact(style: str) -> None:
    tokenizer = loaded(style, "python")
    text = " é日😀 end"
    data = b"".join(tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text))
    prefix = b" " if style == "llama2" else b""
    assert data == prefix + text.encode()
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(TokenizerError, match="negative"):
        tokenizer.token_bytes(-1)


# ---------------------------------------------------------------- chat templates

# ---------------------------------------------------------------- files and errors


def test_ids_come_from_all_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(document("llama3"), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.name, tokenizer.bos_token_id) == ("tokenizers", None)
    assert tokenizer.eos_token_ids == frozenset()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}', encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path), "python")
    assert (tokenizer.name, tokenizer.bos_token_id) == ("python", 1)
    assert tokenizer.eos_token_ids == {2, 4}


def test_without_the_wheel_auto_takes_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    files = {"tokenizer.json": document("llama3")}
    assert load_tokenizer_files(files).name == "python"
    with pytest.raises(TokenizerError, match="not installed"):
        load_tokenizer_files(files, "tokenizers")


def deep(depth: int) -> dict[str, Any]:
    node: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        node = sequence("normalizers", node)
    return node


HOSTILE: list[tuple[str, Any, str]] = [
    ("model", None, "model is NoneType"),
    ("model", {"type": "WordLevel", "vocab": {}}, "'WordLevel' is not supported"),
    ("model.vocab", ["a"], "model.vocab is list; expected dict"),
    ("model.vocab", {"a": "b"}, "not an integer"),
    ("model.vocab", {"a": True}, "not an integer"),
    ("model.vocab", {"a": 1 << 40}, "not an integer from 0"),
    ("model.vocab", {"a": -1}, "not an integer from 0"),
    ("model.vocab", {"a": 0, "b": 0}, "same id"),
    ("model.merges", ["zz qq"], r"merges\[0\]"),
    ("model.merges", [["a"]], r"merges\[0\]"),
    ("model.merges", [7], r"merges\[0\]"),
    ("model.merges", {"a": 1}, "model.merges is dict"),
    ("model.unk_token", "nothing", "unk_token 'nothing'"),
    ("model.unk_token", 3, "unk_token is int"),
    ("model.dropout", 0.5, "dropout 0.5 is not supported"),
    ("model.byte_fallback", "yes", "byte_fallback is str"),
    ("added_tokens", 3, "added_tokens is int"),
    ("added_tokens", [3], "added_tokens is int"),
    ("added_tokens", [{"id": 0}], "added_tokens.content is missing"),
    ("added_tokens",
     [{"id": 9**9, "content": "new", "special": True, "normalized": False}], "has id 387420489"),
    ("normalizer", {"type": "Nmt"}, "'Nmt' is not supported; supported: NFC"),
    ("normalizer", {"type": "Precompiled"}, "precompiled_charsmap is missing"),
    ("normalizer", {"type": 3}, "normalizer.type is int"),
    ("normalizer", "NFC", "normalizer is str"),
    ("normalizer", deep(100), "nests deeper"),
    ("pre_tokenizer", {"type": "Whitespace"}, "'Whitespace' is not supported"),
    ("pre_tokenizer", sequence("wrong"), "pretokenizers is missing"),
    ("pre_tokenizer",
     sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace("first", True)),
     "prepend_scheme 'first' is not supported"),
    ("pre_tokenizer", split("(a+)+$"), "exponential"),
    ("pre_tokenizer", split("(?:a|a)*b"), "exponential"),
    ("pre_tokenizer", split("(a|a){2,}b"), "exponential"),
    ("pre_tokenizer", split("a?" * 30 + "a" * 30), "optional parts"),
    ("pre_tokenizer", split("(a|a)" * 30), "optional parts"),
    ("pre_tokenizer", split("a*a*a*a*b"), "unbounded repeats"),
    ("pre_tokenizer", split("a{0,9}a{0,9}a{0,9}a{0,9}b"), "unbounded repeats"),
    ("pre_tokenizer", split("(" * 1000 + ")" * 1000), "optional parts"),
    ("pre_tokenizer", split("[" * 1000 + "]" * 1000), "nest deeper"),
    ("pre_tokenizer", split(r"\p{Han}+"), "not a general category"),
    ("pre_tokenizer", split(r"[[:alpha:]]"), "not supported"),
    ("pre_tokenizer", split(r"(a)\1"), r"the escape"),
    ("pre_tokenizer", split(r"(?<n>a)"), "not supported"),
    ("pre_tokenizer", split("[a"), "not closed"),
    ("pre_tokenizer", split("a" * 10_000), "longer than"),
    ("pre_tokenizer", split("a)"), "cannot be used"),
    ("decoder", None, "decoder is missing"),
    ("decoder", {"type": "CTC"}, "'CTC'] is not supported"),
    ("decoder", {"type": "WordPiece"}, "decoder.prefix is missing"),
    ("decoder", sequence("decoders", STRIP, *FALLBACK), "is not supported"),
    ("post_processor", {"type": "Other"}, "'Other' is not supported"),
    ("post_processor", {"type": "TemplateProcessing", "single": [], "special_tokens": {}},
     "names the text 0 times"),
    ("post_processor", {"type": "TemplateProcessing", "special_tokens": {},
                        "single": [{"SpecialToken": {"id": "x"}}]}, "special_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), HOSTILE)
def test_hostile_files_are_errors(path: str, value: Any, message: str) -> None:
    whole = json.loads(document("llama3"))
    *parents, last = path.split(".")
    node = functools.reduce(lambda inner, key: inner[key], parents, whole)
    node[last] = value
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "python")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(";") >= 2  # what was wrong; what was expected; what to do
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
        ("tokenizer.json", b"[]", "holds a JSON list"),
        ("tokenizer.json", b"{}", "model is NoneType"),
        ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}', "lone surrogate"),
        ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is int"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [-1]}', "eos_token_id"),
    ],
)
def test_malformed_files_are_errors(
    tmp_path: Path, name: str, content: bytes, message: str, implementation: Any
) -> None:
    (tmp_path / "tokenizer.json").write_text(document("llama3"), encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": sequence("pretokenizers", *[BYTE_LEVEL] * 8)},
        {"normalizer": sequence("normalizers", *[SPACE_TO_MARK | {"content": "ab"}] * 8)},
        {"normalizer": SPACE_TO_MARK | {"content": "x" * 1000}},
    ],
)
def test_steps_that_multiply_a_text_are_refused(part: dict[str, Any], implementation: Any) -> None:
    """A hundred of them would fill any memory at the first word."""
    text = json.dumps(json.loads(document("gpt2")) | part)
    with pytest.raises(TokenizerError, match="more than 64 times as long"):
        load_tokenizer_files({"tokenizer.json": text}, implementation)


def test_what_the_wheel_refuses_is_an_error() -> None:
    whole = json.loads(document("llama3"))
    whole["pre_tokenizer"] = {"type": "Nonsense"}
    with pytest.raises(TokenizerError, match="refused by the tokenizers wheel"):
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "tokenizers")


def test_merges_that_panic_the_wheel_are_an_error_before_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = json.loads(document("llama3"))
    whole["model"]["continuing_subword_prefix"] = "abcdef"
    with pytest.raises(TokenizerError, match="the second begins with 'abcdef'"):
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "tokenizers")
    whole["pre_tokenizer"] = {"type": "N" * 100_000}
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer_files({"tokenizer.json": json.dumps(whole)}, "tokenizers")
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""


def test_missing_files_and_bad_arguments_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="'rust' is unknown"):
        load_tokenizer_files({}, "rust")  # type: ignore[arg-type]
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(TokenizerError, match="lone surrogate"):
            loaded("llama3", implementation).encode("a\ud800")
        with pytest.raises(TokenizerError, match="cannot encode bytes"):
            loaded("llama3", implementation).encode(b"a")  # type: ignore[arg-type]
