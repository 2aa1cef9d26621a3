"""Vocabulary trimming: kept tokens keep their ids' meaning and their logits, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from architectures import ROWS, write_folder

import support
from pocketslm.errors import ExportError
from pocketslm.export.evaluate import evaluate_bundle
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.vocabulary import (
    TrimmedVocabulary,
    format_ranges,
    parse_ranges,
    tokens_of,
    tokens_to_keep,
    trim_tokenizer,
)
from pocketslm.export.recipe import Recipe, read_recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer
from tokenizer_support import CORPUS, STYLES, document

OTHER = "Unseen words: zygote, Ω, 鳥, and the rest of 42 e\u0301 😀 <|im_end|>"


@pytest.mark.parametrize("style", ["smollm", "llama3", "qwen2", "llama2", "gemma", "no-fallback"])
def test_texts_of_kept_tokens_are_tokenized_as_before(style: str) -> None:
    assert style in STYLES
    whole = tokenizers.Tokenizer.from_str(document(style))
    text = " ".join(CORPUS[0].split()[:8]) + CORPUS[1]
    ids = whole.encode(text).ids
    keep = tokens_to_keep(json.loads(document(style)), ids)
    assert set(ids) <= set(keep) < set(range(whole.get_vocab_size()))
    number = {old: new for new, old in enumerate(keep)}
    trimmed = tokenizers.Tokenizer.from_str(
        json.dumps(trim_tokenizer(json.loads(document(style)), number))
    )
    assert [keep[id_] for id_ in trimmed.encode(text).ids] == ids
    assert trimmed.decode(trimmed.encode(text).ids) == whole.decode(ids)
    if style != "no-fallback":  # its own unknown characters are lost in the whole one as well
        assert trimmed.decode(trimmed.encode(OTHER).ids) == whole.decode(whole.encode(OTHER).ids)


def test_the_biases_of_a_head_go_with_its_rows(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS["phi2"])
    whole = load_reference(open_checkpoint(folder))
    kept = [*range(0, 260, 2), 261, 263]
    trimmed = load_reference(TrimmedVocabulary(open_checkpoint(folder), kept))
    ids = torch.arange(20)[None]
    few, _ = trimmed(ids, trimmed.empty_cache())
    all_, _ = whole(torch.tensor(kept)[ids], whole.empty_cache())
    assert torch.equal(few, all_[..., kept])


def test_a_count_keeps_the_most_frequent_and_what_they_need() -> None:
    tokenizer = json.loads(document("smollm"))
    whole = tokenizers.Tokenizer.from_str(document("smollm"))
    ids = whole.encode(" the the the quick quick fox").ids
    everything = tokens_to_keep(tokenizer, ids)
    base = tokens_to_keep(tokenizer, [])
    the = whole.encode(" the").ids[-1]
    for count in range(len(base), len(everything) + 1):
        keep = tokens_to_keep(tokenizer, ids, count)
        assert len(keep) <= count
        assert set(base) <= set(keep) <= set(everything)
    assert the in tokens_to_keep(tokenizer, ids, len(everything))
    with pytest.raises(ExportError, match=f"special tokens are {len(base)}"):
        tokens_to_keep(tokenizer, ids, len(base) - 1)
    with pytest.raises(ExportError, match="Unigram"):
        tokens_to_keep({"model": {"type": "Unigram"}}, ids)


@pytest.mark.parametrize("source", ["tiny_hf", "tiny_gguf"])
def test_logits_of_kept_tokens_are_bit_for_bit_the_same(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(source))
    # Dropped from the middle: every later id moves.
    keep = [id_ for id_ in range(support.TINY.vocab_size) if id_ % 5 or id_ >= 256]
    export_bundle(checkpoint, tmp_path / "whole")
    recipe = Recipe(vocabulary=format_ranges(keep))
    manifest = export_bundle(checkpoint, tmp_path / "trimmed", recipe)
    assert any(f"to {len(keep)} of {support.TINY.vocab_size}" in note for note in manifest.notes)
    new = np.random.default_rng(0).integers(0, len(keep), 60)
    for backend in ("native", "onnx"):
        logits = [
            open_session(open_bundle(tmp_path / name), backend).forward(ids, all_logits=True)
            for name, ids in (("whole", np.array(keep)[new]), ("trimmed", new))
        ]
        assert logits[1].shape == (60, len(keep))
        np.testing.assert_array_equal(logits[0][:, keep], logits[1])
    ids = load_tokenizer(tmp_path / "trimmed")
    assert {keep[id_] for id_ in ids.eos_token_ids} == {257}
    assert keep[ids.bos_token_id or 0] == 256


def test_a_trimmed_bundle_is_evaluated_on_its_own_tokens(tiny_hf: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    keep = tokens_of(open_checkpoint(tiny_hf), text)
    assert len(keep) < support.TINY.vocab_size
    recipe = Recipe(weights="float", head="float", vocabulary=format_ranges(keep))
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "out", recipe)
    quality = evaluate_bundle(
        tmp_path / "out", source=open_checkpoint(tiny_hf), text=text, window=32
    )
    assert quality.kl < 1e-5
    assert quality.top1 > 0.99
    assert read_recipe(tmp_path / "out" / "recipe.toml").vocabulary == recipe.vocabulary


def test_ranges() -> None:
    for ids, written in (([0], "0"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")):
        assert format_ranges(ids) == written
        assert parse_ranges(written) == ids
    for bad in ("", "a", "1-", "1,,2", "-1", "9" * 30):
        with pytest.raises(ExportError, match="not a range"):
            parse_ranges(bad)


def test_ids_outside_the_vocabulary_are_errors(tiny_hf: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    for keep in ([], [-1], [support.TINY.vocab_size]):
        with pytest.raises(ExportError, match=r"0\.\.263"):
            TrimmedVocabulary(checkpoint, keep)
    with pytest.raises(ExportError, match=r"<\|im_start\|>"):
        TrimmedVocabulary(checkpoint, range(256)).tokenizer_files()
