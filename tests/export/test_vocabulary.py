"""Vocabulary trimming: kept tokens keep their ids' meaning and their logits, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import support
from pocketslm.errors import ExportError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.vocabulary import TrimmedVocabulary, tokens_to_keep, trim_tokenizer
from pocketslm.models.checkpoint import open_checkpoint
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
    trimmed = TrimmedVocabulary(checkpoint, keep)
    export_bundle(checkpoint, tmp_path / "whole")
    manifest = export_bundle(trimmed, tmp_path / "trimmed")
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


def test_ids_outside_the_vocabulary_are_errors(tiny_hf: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    for keep in ([], [-1], [support.TINY.vocab_size]):
        with pytest.raises(ExportError, match=r"0\.\.263"):
            TrimmedVocabulary(checkpoint, keep)
    with pytest.raises(ExportError, match=r"<\|im_start\|>"):
        TrimmedVocabulary(checkpoint, range(256)).tokenizer_files()
