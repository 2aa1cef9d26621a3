"""Vocabulary trimming: drop the tokens that a corpus or language does not use.

Below 200M parameters the embedding is a fifth of the weights, and most of its rows belong to words
and scripts that an application never sees. Their rows are left out and the merges that lead to
them; all others stay as they are, quantized blocks too. A text whose tokens are all kept is
tokenized as before and gets the same logits for them, bit for bit; any other text falls into
smaller tokens. Every byte and every special token is kept, so nothing becomes unwritable.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import ExportError
from pocketslm.export.prune.pruned import Pruned
from pocketslm.export.text import read_text
from pocketslm.export.tokenizer import settled
from pocketslm.models.checkpoint import EMBEDDING, HEAD, HEAD_BIAS, Checkpoint
from pocketslm.models.tensors import QuantTensor, Weight
from pocketslm.runtime.tokenizer import load_tokenizer_files

_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class TrimmedVocabulary(Pruned):
    """A checkpoint with the tokens ``kept`` alone (sorted ids of the whole one), renumbered."""

    def __init__(self, whole: Checkpoint, kept: Sequence[int]) -> None:
        ids = sorted(set(kept))
        if not ids or ids[0] < 0 or ids[-1] >= whole.config.vocab_size:
            raise ExportError(f"kept tokens must lie in 0..{whole.config.vocab_size - 1}")
        config = replace(whole.config, vocab_size=len(ids))
        note = f"vocabulary trimmed to {len(ids)} of {whole.config.vocab_size} tokens"
        super().__init__(whole, config, note)
        self.kept = ids

    def weight(self, name: str) -> Weight:
        weight = self.whole.weight(name)
        if name not in (EMBEDDING, HEAD, HEAD_BIAS):
            return weight
        index = np.array(self.kept)
        return weight.rows(index) if isinstance(weight, QuantTensor) else weight[index]

    def tokenizer_files(self) -> dict[str, bytes]:
        files, _ = settled(self.whole.tokenizer_files(), self.whole.config.vocab_size)
        number = {old: new for new, old in enumerate(self.kept)}
        tokenizer = trim_tokenizer(json.loads(files["tokenizer.json"]), number)
        files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False).encode()
        if "generation_config.json" in files:
            generation = json.loads(files["generation_config.json"])
            for field in _ID_FIELDS:
                if field in generation:
                    generation[field] = _renumber(generation[field], number)
            files["generation_config.json"] = json.dumps(generation, indent=2).encode()
        return files


def tokens_of(checkpoint: Checkpoint, text: Path, count: int | None = None) -> list[int]:
    """:func:`tokens_to_keep` for a UTF-8 text as the checkpoint's own tokenizer reads it."""
    content = read_text(text)
    files, _ = settled(checkpoint.tokenizer_files(), checkpoint.config.vocab_size)
    ids = load_tokenizer_files(files).encode(content)
    return tokens_to_keep(json.loads(files["tokenizer.json"]), ids, count)


def tokens_to_keep(
    tokenizer: dict[str, Any], ids: Iterable[int], count: int | None = None
) -> list[int]:
    """Which tokens to keep for a text tokenized to ``ids``; ``count`` limits how many.

    Always kept: added tokens, what single bytes are written with, and whatever a kept token is
    merged from. The most
    frequent tokens come first, so a smaller ``count`` keeps a subset. Raises ExportError for a
    tokenizer that is not BPE, or a ``count`` that has no room for what is always kept.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"cannot trim a {model.get('type')} vocabulary, expected BPE; export it whole"
        )
    vocabulary: dict[str, int] = model["vocab"]
    texts = {id_: text for text, id_ in vocabulary.items()}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    kept = {token["id"] for token in tokenizer.get("added_tokens", ())}
    # With byte fallback the single characters need not stay: their bytes do.
    single = _is_byte if model.get("byte_fallback") else _is_byte_or_character
    kept |= {id_ for text, id_ in vocabulary.items() if single(text)}
    if (unknown := model.get("unk_token")) is not None:
        kept.add(vocabulary[unknown])
    if count is not None and count < len(kept):
        raise ExportError(f"cannot keep {count} tokens: bytes and special tokens are {len(kept)}")
    for id_, _ in Counter(ids).most_common():
        if id_ in kept:
            continue
        needed = {
            vocabulary[text] for text in _merged_from(texts[id_], ranks) if text in vocabulary
        } - kept | {id_}
        if count is None or len(kept) + len(needed) <= count:
            kept |= needed
    return sorted(kept)


def format_ranges(ids: Sequence[int]) -> str:
    """Sorted ids as ``0-270,300``."""
    runs = itertools.groupby(enumerate(ids), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def parse_ranges(text: str) -> list[int]:
    """The inverse of :func:`format_ranges`; ExportError for anything else."""
    ids: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", part)
        if match is None:
            raise ExportError(f"{part[:40]!r} is not a range such as 0-270")
        ids += range(int(match[1]), int(match[2] or match[1]) + 1)
    return ids


def trim_tokenizer(tokenizer: dict[str, Any], number: dict[int, int]) -> dict[str, Any]:
    """``tokenizer.json`` with the tokens of ``number`` (old id to new) and their merges alone.

    Raises ExportError where an added token, such as the end of a turn, is not among them.
    """
    model = tokenizer["model"]
    for token in tokenizer.get("added_tokens", ()):
        if token["id"] not in number:
            raise ExportError(f"the added token {token['content']!r} must be kept")
    vocabulary = {text: number[id_] for text, id_ in model["vocab"].items() if id_ in number}
    merges = [m for m in model["merges"] if {*_pair(m), "".join(_pair(m))} <= vocabulary.keys()]
    trimmed = tokenizer | {"model": model | {"vocab": vocabulary, "merges": merges}}
    trimmed["added_tokens"] = [
        token | {"id": number[token["id"]]} for token in tokenizer.get("added_tokens", ())
    ]
    post = json.loads(json.dumps(tokenizer.get("post_processor")))
    _renumber_templates(post, number)
    return trimmed | {"post_processor": post}


def _renumber_templates(processor: Any, number: dict[int, int]) -> None:
    """The special tokens of a TemplateProcessing, however deep it lies, in place."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors", ()):
        _renumber_templates(inner, number)
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [number[id_] for id_ in token["ids"]]


def _renumber(value: Any, number: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [number[id_] for id_ in value]
    return None if value is None else number[value]


def _merged_from(text: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Every token that BPE passes through on its way to ``text``.

    Merges never cross the border of a token that comes out, so the way there is that of its text
    alone; to follow it is right where several merges lead to one token, too (Llama 2).
    """
    symbols, found = list(text), set(text)
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found.add(symbols[at])
    return found


def _pair(merge: Any) -> tuple[str, str]:
    """A merge is written ``["a", "b"]`` or ``"a b"``."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _is_byte_or_character(text: str) -> bool:
    return len(text) == 1 or _is_byte(text)
