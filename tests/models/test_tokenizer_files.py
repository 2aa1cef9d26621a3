"""Tokenizer files out of GGUF metadata."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from pocketslm.errors import TokenizerError
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.pretokenizer_guess import guess_pretokenizer
from pocketslm.models.tokenizer_files import (
    _PRE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
    tokenizer_files_from_gguf,
    tokenizer_notes,
)
from pocketslm.runtime.tokenizer import load_tokenizer_files

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
IMPLEMENTATIONS = ("tokenizers", "python")


def byte_level(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    """Metadata of a small byte-level vocabulary."""
    tokens = ["<|end|>", "<tag>", *ALPHABET, "Ġa", "in", "he", "Ġthe", "Ġt", "12"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["Ġ t", "Ġ a", "i n", "h e", "Ġt he", "1 2"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def sentence_piece(**more: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary with byte fallback."""
    words = ["▁t", "he", "▁the", "in", "▁▁", "er", "▁th", "ther", "▁in", "erin", "the", "th"]
    letters = [*"▁abcdefghinrst", "é"]
    tokens = ["<unk>", "<s>", "</s>", "<tag>", *(f"<0x{byte:02X}>" for byte in range(256))]
    head = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED] + [BYTE] * 256
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(words) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *words, *letters],
        "tokenizer.ggml.token_type": head + [NORMAL] * (len(words) + len(letters)),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def by_scores(metadata: dict[str, Any], text: str) -> list[str]:
    """SentencePiece's own rule: join the neighbours with the best score, the leftmost first."""
    types = metadata["tokenizer.ggml.token_type"]
    scores = {
        token: score
        for token, score, kind in zip(
            metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], types, strict=True
        )
        if kind == NORMAL
    }
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [(left + right) for left, right in pairwise(pieces)]
        known = [(-scores[piece], at) for at, piece in enumerate(joined) if piece in scores]
        if not known:
            break
        at = min(known)[1]
        pieces[at : at + 2] = [joined[at]]
    return [
        part
        for piece in pieces
        for part in ([piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()])
    ]


@pytest.mark.real
def test_smollm2_has_the_components_of_its_hugging_face_file(smollm2_gguf: Path) -> None:
    metadata = GGUFFile(smollm2_gguf).metadata
    files = tokenizer_files_from_gguf(metadata)
    document = json.loads(files["tokenizer.json"])
    assert document["normalizer"] is None
    assert document["post_processor"] is None
    assert document["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }
    assert document["decoder"]["type"] == "ByteLevel"
    assert document["model"]["unk_token"] is None
    assert len(document["model"]["merges"]) == 48900
    assert [token["id"] for token in document["added_tokens"]] == list(range(17))
    assert all(token["special"] for token in document["added_tokens"])
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"
    assert files["chat_template.jinja"] == metadata["tokenizer.chat_template"]


@pytest.mark.real
def test_smollm2_ids_equal_llama_cpp(smollm2_gguf: Path, lee_lines: list[str]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    files = tokenizer_files_from_gguf(GGUFFile(smollm2_gguf).metadata)
    ours = load_tokenizer_files(files, "python")
    for line in [*lee_lines[:2000], "a <|im_end|>b"]:
        for special in (False, True):
            expected = theirs.tokenize(line.encode(), add_bos=False, special=special)
            assert ours.encode(line, parse_special=special) == expected
    theirs.close()


@pytest.mark.parametrize("pre", sorted(_PRE))
def test_every_known_pre_tokenizer_loads_and_agrees(pre: str) -> None:
    files = tokenizer_files_from_gguf(byte_level(pre))
    text = "the in 1212½ he'LL\tthe\r\n\n  <tag>çé 東京ǅA— $^ x_y // <|end|>"
    wheel, own = (load_tokenizer_files(files, name) for name in IMPLEMENTATIONS)  # type: ignore[arg-type]
    assert wheel.encode(text) == own.encode(text)
    assert own.decode(own.encode(text)) == text
    assert own.encode("<tag>") == [1]
    assert own.encode("<|end|>", parse_special=True) == [0]
    assert own.encode("<|end|>") != [0]
    assert own.encode("a", add_special_tokens=True)[0] == (
        0 if _PRE[pre].add_bos else own.encode("a")[0]
    )


def vocabulary_like(*evidence: str) -> list[str]:
    """Enough tokens to tell a pre-tokenizer by, of which `evidence` are the telling ones."""
    return [*(f"w{letter}{index:04x}g" for letter in "ab" for index in range(3000)), *evidence]


@pytest.mark.parametrize(
    ("evidence", "name"),
    [
        (["1", "9", "Ġx"], "smollm"),
        (["1", "12", "Ġ1234"], "gpt-2"),
        (["1", "(get", "toString"], "qwen2"),
        (["1", "(get", "tostring"], "tekken"),
        (["1", "123", "(get", "toString", "âĢľThe"], "llama-bpe"),
        (["1", "123", "(get", "tostring", "âĢľThe"], "gpt-4o"),
        (["1", "123", "(get", "toString"], "deepseek-v3"),
        (["1", "12345", "(get", "toString"], None),
        (["1", "12"], None),
        ([], None),
    ],
)
def test_a_missing_pre_tokenizer_is_told_by_the_vocabulary(
    evidence: list[str], name: str | None
) -> None:
    tokens = vocabulary_like(*evidence)
    assert guess_pretokenizer(tokens) == name
    assert guess_pretokenizer(tokens[-100:]) is None
    alphabet = [letter for letter in ALPHABET if letter not in tokens]
    types = [NORMAL] * len(tokens) + [USER_DEFINED] * len(alphabet)
    metadata = byte_level(None, tokens=tokens + alphabet, token_type=types, merges=[])
    if name is None:
        with pytest.raises(TokenizerError, match="pre is missing, and the vocabulary does not"):
            tokenizer_files_from_gguf(metadata)
        assert tokenizer_notes(metadata) == []
        return
    said = {**metadata, "tokenizer.ggml.pre": name}
    assert tokenizer_files_from_gguf(metadata) == tokenizer_files_from_gguf(said)
    assert tokenizer_notes(metadata) == [
        f"tokenizer.ggml.pre is missing; by its vocabulary it is {name!r}"
    ]
    assert tokenizer_notes(said) == []


@pytest.mark.real
def test_smollm2_is_told_by_its_vocabulary(smollm2_gguf: Path) -> None:
    metadata = GGUFFile(smollm2_gguf).metadata
    without = {k: v for k, v in metadata.items() if k != "tokenizer.ggml.pre"}
    assert tokenizer_files_from_gguf(without) == tokenizer_files_from_gguf(metadata)


@pytest.mark.parametrize(
    ("role", "id_"), [("padding", 2**32 - 1), ("padding", 10**6), ("unknown", 999), ("eot", -1)]
)
def test_an_id_that_is_no_token_is_ignored_with_a_note(role: str, id_: int) -> None:
    metadata = byte_level(**{f"{role}_token_id": id_})
    assert tokenizer_files_from_gguf(metadata) == tokenizer_files_from_gguf(byte_level())
    (note,) = tokenizer_notes(metadata)
    assert note == f"tokenizer.ggml.{role}_token_id is {id_}, which is no token, and was ignored"


def test_pre_tokenizers_split_as_their_names_say() -> None:
    def pieces(pre: str | None, text: str) -> list[str]:
        document = tokenizer_files_from_gguf(byte_level(pre))["tokenizer.json"]
        steps = tokenizers.Tokenizer.from_str(document).pre_tokenizer
        return [piece for piece, _ in steps.pre_tokenize_str(text)]

    assert pieces("gpt-2", "x12345 y") == ["x", "12345", "Ġy"]
    assert pieces("smollm", "x12345") == ["x", "1", "2", "3", "4", "5"]
    assert pieces("llama-bpe", "x12345 Y'S") == ["x", "123", "45", "ĠY", "'S"]
    assert pieces("qwen2", "x12") == ["x", "1", "2"]
    assert pieces("default", "x1234=") == ["x", "123", "4", "="]
    assert pieces("gpt-4o", "fooBar don't") == ["foo", "Bar", "Ġdon't"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("prefix", [False, True])
def test_scores_become_merges(prefix: bool, implementation: Any) -> None:
    metadata = sentence_piece(add_space_prefix=prefix)
    tokenizer = load_tokenizer_files(tokenizer_files_from_gguf(metadata), implementation)
    tokens = metadata["tokenizer.ggml.tokens"]
    for text in ("the other there", "  in  the rain", "theériné 😀", "<s>the</s>", "\n", "th erin"):
        expected = by_scores(metadata, (" " if prefix else "") + text)
        assert [tokens[id_] for id_ in tokenizer.encode(text)] == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<tag>") == [3]
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1
    assert tokenizer.eos_token_ids == {2}


def test_merges_follow_the_scores_and_skip_what_text_cannot_be() -> None:
    tokens = ["ab", "a", "b", "abc", "c", "bc", "<s>", "<s", ">"]
    scores = [-3.0, 0.0, 0.0, -1.0, 0.0, -2.0, 5.0, 0.0, 0.0]
    types = [NORMAL] * 6 + [CONTROL, NORMAL, NORMAL]
    assert merges_from_scores(tokens, types, scores) == [
        ["ab", "c"],
        ["a", "bc"],
        ["b", "c"],
        ["a", "b"],
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_added_tokens_of_phi3_take_the_white_space_after_them(implementation: Any) -> None:
    metadata = sentence_piece() | {"general.architecture": "phi3"}
    tokenizer = load_tokenizer_files(tokenizer_files_from_gguf(metadata), implementation)
    assert tokenizer.encode("<tag> \n the") == tokenizer.encode("<tag>the")
    unknown = tokenizer.encode("<unk> the", parse_special=True)
    assert unknown != tokenizer.encode("<unk>the", parse_special=True)
    other = load_tokenizer_files(tokenizer_files_from_gguf(sentence_piece()), implementation)
    assert other.encode("<tag> the") != other.encode("<tag>the")


def test_end_tokens_and_affixes() -> None:
    metadata = byte_level(eot_token_id=1, add_bos_token=True, add_eos_token=True)
    files = tokenizer_files_from_gguf(metadata)
    tokenizer = load_tokenizer_files(files, "python")
    assert tokenizer.eos_token_ids == {0, 1}
    inner = tokenizer.encode("a")
    assert tokenizer.encode("a", add_special_tokens=True) == [0, *inner, 0]
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 512
    assert "chat_template.jinja" not in files


def test_without_token_types_the_named_tokens_are_special() -> None:
    metadata = byte_level()
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load_tokenizer_files(tokenizer_files_from_gguf(metadata), "python")
    assert tokenizer.special_ids == {0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.tokens is missing"),
        (byte_level(model="rwkv"), "'rwkv' is not supported; supported: gpt2, llama"),
        (byte_level("nonsense"), "'nonsense' is unknown; known: codeshell, .*smollm"),
        (byte_level(pre=3), "tokenizer.ggml.pre 3 is unknown"),
        (byte_level(tokens=["a", "a"]), "'a' twice"),
        (byte_level(tokens=[1]), "expected a list of str"),
        (byte_level(token_type=[1]), "has 1 entries"),
        (byte_level(merges=["ab"]), "'ab'; expected two tokens"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(eos_token_id=10**6), "eos_token_id is 1000000; expected 0 to"),
        (byte_level(add_bos_token="yes"), "expected true or false"),
        (sentence_piece(scores=None), "scores is missing; expected a list of int or float"),
        (sentence_piece(scores=[0.0]), "has 1 entries"),
    ],
)
def test_bad_metadata_is_an_error(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_files_from_gguf(metadata)
    assert "\n" not in str(caught.value)
