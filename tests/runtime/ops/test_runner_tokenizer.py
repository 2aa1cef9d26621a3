"""The runner's tokenizers against `tokenizers`, family by family."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import native_support
import pytest
import tokenizers
from native_runner import Runner, running

import tokenizer_support
from pocketslm.export.lower.native import lower
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.models.checkpoint import open_checkpoint

SEED = 11
RANDOM_TEXTS = 150
COVERED = ("smollm", "llama3", "qwen2", "llama2", "metaspace-first")
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
    for _ in range(RANDOM_TEXTS):
        yield "".join(rng.choices(NASTY, k=rng.randint(1, 12)))


@pytest.fixture(scope="module", params=COVERED)
def family(
    request: pytest.FixtureRequest, runner_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runner, tokenizers.Tokenizer]]:
    reference = tokenizers.Tokenizer.from_str(json.dumps(document(request.param)))
    packed, reason = pack_tokenizer(json.dumps(document(request.param)))
    assert packed is not None, reason
    path = tmp_path_factory.mktemp(request.param) / "model.slm"
    config = native_support.tiny_config(vocab_size=reference.get_vocab_size())
    lower(config, native_support.tiny_weights(config, lambda _, w: w), path, tokenizer=packed)
    with running([str(runner_path)]) as runner:
        assert runner.ask(op="load", path=str(path), threads=1, context=300)["tokenizer"]
        yield runner, reference


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
    """The comparison above can fail: two families disagree on its texts."""
    first, second = (
        tokenizers.Tokenizer.from_str(json.dumps(document(style))) for style in ("llama3", "qwen2")
    )
    assert any(first.encode(text).ids != second.encode(text).ids for text in random_texts())


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        ("gpt2", "adds a space"),
        ("gpt4o", "not GPT-2's, Llama 3's or Qwen 2's"),
        ("lowercase", "normalizes"),
        ("no-fallback", "byte alphabet|fallback|pre-tokenizer"),
        ("metaspace-always", "decoder"),
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
def test_smollm2_equals_tokenizers(
    smollm2_gguf: Path, lee_text: Path, runner_path: Path, tmp_path: Path
) -> None:
    text = open_checkpoint(smollm2_gguf).tokenizer_files()["tokenizer.json"]
    reference = tokenizers.Tokenizer.from_str(
        str(text, "utf-8") if isinstance(text, bytes) else text
    )
    packed, reason = pack_tokenizer(text)
    assert packed is not None, reason
    config = native_support.tiny_config(vocab_size=reference.get_vocab_size())
    weights = native_support.tiny_weights(config, lambda _, w: w)
    lower(config, weights, tmp_path / "m.slm", tokenizer=packed)
    with running([str(runner_path)]) as runner:
        runner.ask(op="load", path=str(tmp_path / "m.slm"), threads=1, context=64)
        for line in lee_text.read_text(encoding="utf-8").splitlines()[:40]:
            assert runner.ask(op="encode", prompt=line)["tokens"] == reference.encode(line).ids
