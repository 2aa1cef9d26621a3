"""The runner's tokenizers against `tokenizers`, family by family."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizer_families
import tokenizers
from native_runner import Runner
from native_support import running_with

import tokenizer_support
from pocketslm.export.lower.native_tokenizer import pack_tokenizer

SEED = 11
RANDOM_TEXTS = 150
COVERED = (
    *("smollm", "llama3", "qwen2", "qwen35", "gpt4o", "tekken", "minicpm5", "deepseek3"),
    *("llama2", "gemma", "metaspace-first"),
)
# One character of every kind that words and normalization treat apart.
NASTY = [
    *tokenizer_support.AWKWARD,
    *(
        " ",
        "  ",
        "\n",
        "\r",
        "\t",
        "'",
        "s",
        "S",
        "LL",
        "a",
        "Z",
        "7",
        "12345",
        "_",
        "-",
        "é",
        "東",
    ),
    *("\u0344", "\u0958", "\u1100\u1161\u11a8", "\uac00\u11a8", "q\u0323\u0307", "q\u0307\u0323"),
    *("\u212b", "\uf900", "\U0002f800", "\u0f73", "\u09c7\u09be", "\u0300", "a\u0315\u0300"),
]


@functools.cache
def document(style: str) -> dict[str, object]:
    whole: dict[str, object] = json.loads(tokenizer_support.document(style))
    return whole


def random_texts() -> Iterator[str]:
    rng = random.Random(SEED)
    yield from tokenizer_support.CORPUS
    yield from NASTY
    yield "x" * 3000
    yield " " * 300 + "end"
    yield from tokenizer_support.hard_texts(RANDOM_TEXTS)
    for _ in range(RANDOM_TEXTS):
        yield "".join(rng.choices(NASTY, k=rng.randint(1, 12)))


def whole(text: str) -> tokenizers.Tokenizer:
    """The reference, without the padding and truncation that an encoder's file asks for."""
    reference = tokenizers.Tokenizer.from_str(text)
    reference.no_padding()
    reference.no_truncation()
    return reference


@pytest.fixture(scope="module", params=COVERED)
def family(
    request: pytest.FixtureRequest, runner_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runner, tokenizers.Tokenizer]]:
    text = json.dumps(document(request.param))
    with running_with(runner_path, text, tmp_path_factory.mktemp(request.param)) as runner:
        yield runner, tokenizers.Tokenizer.from_str(text)


def test_ids_equal_tokenizers(family: tuple[Runner, tokenizers.Tokenizer]) -> None:
    runner, reference = family
    for text in random_texts():
        expected = reference.encode(text, add_special_tokens=True).ids
        assert runner.ask(op="encode", prompt=text)["tokens"] == expected, repr(text)


def test_real_text_equals_tokenizers(
    family: tuple[Runner, tokenizers.Tokenizer], lee_text: Path
) -> None:
    runner, reference = family
    for line in lee_text.read_text(encoding="utf-8").splitlines()[:30]:
        expected = reference.encode(line, add_special_tokens=True).ids
        assert runner.ask(op="encode", prompt=line)["tokens"] == expected


def test_answers_are_decoded_text(family: tuple[Runner, tokenizers.Tokenizer]) -> None:
    runner, reference = family
    for seed in range(8):
        tokens, text, _ = runner.generate(
            prompt="the quick", max_tokens=40, temperature=5.0, seed=seed, ignore_eos=True
        )
        expected = reference.decode(tokens, skip_special_tokens=True)
        # Where byte tokens are not UTF-8 the wheel replaces each byte of their run.
        if "\ufffd" not in expected:
            assert text == expected


def test_ids_of_a_wrong_family_differ() -> None:
    """The comparison above can fail: any two families disagree on its texts."""
    ids = {}
    for style in COVERED[:8]:
        reference = tokenizers.Tokenizer.from_str(json.dumps(document(style)))
        ids[style] = [encoded.ids for encoded in reference.encode_batch(list(random_texts()))]
    for first, second in itertools.combinations(ids, 2):
        assert ids[first] != ids[second], (first, second)


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_equal_tokenizers(lowercase: bool, runner_path: Path, tmp_path: Path) -> None:
    text = tokenizer_support.word_piece(lowercase)
    reference = whole(text)
    with running_with(runner_path, text, tmp_path) as runner:
        for prompt in [*random_texts(), "x" * 100, "é" * 101, "\u0130 \u03a3\u0301"]:
            expected = reference.encode(prompt).ids
            assert runner.ask(op="encode", prompt=prompt)["tokens"] == expected, repr(prompt)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_added_tokens_take_white_space_along(flag: str, runner_path: Path, tmp_path: Path) -> None:
    whole = json.loads(tokenizer_support.document("llama2"))
    whole["added_tokens"][-2][flag] = True
    assert whole["added_tokens"][-2]["content"] == "<tool_call>"
    text = json.dumps(whole)
    reference = tokenizers.Tokenizer.from_str(text)
    with running_with(runner_path, text, tmp_path) as runner:
        rng = random.Random(SEED)
        pieces = ["<tool_call>", "<s>", " ", "\n", "\u3000", "a", "é", "b c"]
        for _ in range(200):
            prompt = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
            expected = reference.encode(prompt, add_special_tokens=True).ids
            assert runner.ask(op="encode", prompt=prompt)["tokens"] == expected, repr(prompt)


LONG = 1_000_000
"""Characters of a prompt that would take minutes in quadratic time and takes under a second."""


@pytest.mark.parametrize("style", ["smollm", "minicpm5", "deepseek3", "tekken", "llama2", "gemma"])
def test_a_long_prompt_takes_linear_time(style: str, runner_path: Path, tmp_path: Path) -> None:
    with running_with(runner_path, json.dumps(document(style)), tmp_path) as runner:
        watchdog = threading.Timer(120, runner.process.kill)
        watchdog.start()
        for unit in ("ab cd ", "a", " ", "\n  ", "▁", "東A", "<|im_", "\x01", "A.", "1"):
            prompt = unit * (LONG // len(unit))
            assert runner.ask(op="encode", prompt=prompt)["tokens"], unit
        watchdog.cancel()


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        ("gpt2", "adds a space"),
        ("possessive", "of no known family"),
        ("split-Removed-False", "of no known family"),
        ("lowercase", "normalizes"),
        ("no-fallback", "byte alphabet|fallback|pre-tokenizer"),
        ("metaspace-always", "decoder"),
        ("unigram-bytes", "falls back to bytes"),
    ],
)
def test_what_is_not_covered_is_said(style: str, reason: str) -> None:
    packed, said = pack_tokenizer(json.dumps(document(style)))
    assert packed is None
    assert re.search(reason, said), said
    packed, said = pack_tokenizer("{}")
    assert packed is None
    assert "unknown form" in said


@pytest.mark.real
@pytest.mark.parametrize("name", tokenizer_families.FILES)
def test_real_files_equal_tokenizers(
    name: str, lee_text: Path, runner_path: Path, tmp_path: Path
) -> None:
    text = tokenizer_families.tokenizer_json(name)
    reference = whole(text)
    lines = lee_text.read_text(encoding="utf-8").splitlines()[:40]
    with running_with(runner_path, text, tmp_path) as runner:
        for prompt in [*lines, *tokenizer_support.hard_texts(RANDOM_TEXTS)]:
            expected = reference.encode(prompt).ids
            assert runner.ask(op="encode", prompt=prompt)["tokens"] == expected, repr(prompt)
