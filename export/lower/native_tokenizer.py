"""Pack tokenizer.json for ``pocketslm-run``, which has no reader of such files.

The runner covers BPE over bytes with the words of GPT-2 (digits apart or not), Llama 3 and Qwen 2,
and SentencePiece's BPE with byte fallback (Llama 2, TinyLlama); for anything else these functions
return a reason instead, and the runner takes token ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from pocketslm.models.tokenizer_files import LLAMA3_WORDS, QWEN2_WORDS
from pocketslm.runtime.tokenizer import postprocessors
from pocketslm.runtime.tokenizer.decoders import byte_token
from pocketslm.runtime.tokenizer.pretokenizers import byte_alphabet

VERSION = 2
NO_TOKEN = 2**32 - 1  # a byte that no text of the training data had; it encodes to nothing
MARK = "▁"
Node = Mapping[str, Any]

# As in runtime/ops/runner/tokenizer.h.
GPT2, GPT2_DIGITS, LLAMA3, QWEN2, WHOLE, SPACES = range(6)
WHOLE_WORDS, NFC, SPACE_ALWAYS, SPACE_AT_START, STRIP_SPACE = (1 << bit for bit in range(5))

_PREPEND = {"type": "Prepend", "prepend": MARK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_DECODE = [
    {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class _Unsupported(Exception):
    """Why the runner cannot take text of a tokenizer."""


def _parts(node: Node | None, key: str) -> list[Node]:
    if node is None:
        return []
    return list(node[key]) if node["type"] == "Sequence" else [node]


def _check(condition: object, reason: str) -> None:
    if not condition:
        raise _Unsupported(reason)


def _byte_level(tokenizer: Node) -> tuple[int, int]:
    """The words and flags of a BPE over bytes."""
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    _check([n["type"] for n in normalizers] in ([], ["NFC"]), "the tokenizer normalizes text")
    flags = (NFC if normalizers else 0) | (
        WHOLE_WORDS if tokenizer["model"].get("ignore_merges") else 0
    )
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    unknown = "the pre-tokenizer is not GPT-2's, Llama 3's or Qwen 2's"
    _check(words and words[-1]["type"] == "ByteLevel", unknown)
    level = words[-1]
    _check(not level.get("add_prefix_space", True), "the pre-tokenizer adds a space")
    if level.get("use_regex", True):
        digits = words[:-1]
        if not digits:
            return GPT2, flags
        apart = len(digits) == 1 and digits[0]["type"] == "Digits"
        _check(apart and digits[0].get("individual_digits"), unknown)
        return GPT2_DIGITS, flags
    _check(len(words) == 2 and words[0]["type"] == "Split", unknown)
    _check(words[0]["behavior"] == "Isolated", unknown)
    known = {LLAMA3_WORDS: LLAMA3, QWEN2_WORDS: QWEN2}
    pattern = words[0]["pattern"].get("Regex")
    _check(pattern in known, unknown)
    return known[pattern], flags


def _sentence_piece(tokenizer: Node) -> tuple[int, int]:
    """The words and flags of a BPE over characters with SentencePiece's marks."""
    normalizers = [dict(n) for n in _parts(tokenizer.get("normalizer"), "normalizers")]
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    decoders = [dict(d) for d in _parts(tokenizer.get("decoder"), "decoders")]
    _check(decoders in (_DECODE, [*_DECODE, _STRIP]), "the decoder is not SentencePiece's")
    _check(not tokenizer["model"].get("ignore_merges"), "the tokenizer's BPE ignores merges")
    flags = STRIP_SPACE if decoders[-1] == _STRIP else 0
    if not words:
        if normalizers == [_PREPEND, _REPLACE]:
            return WHOLE, flags | SPACE_ALWAYS
        _check(normalizers == [_REPLACE], "the tokenizer normalizes text")
        return WHOLE, flags
    _check(not normalizers, "the tokenizer normalizes text")
    metaspace = words[0]
    _check(len(words) == 1 and metaspace["type"] == "Metaspace", "the pre-tokenizer is unknown")
    _check(metaspace["replacement"] == MARK, "the pre-tokenizer has another mark")
    scheme = metaspace.get("prepend_scheme", "always")
    _check(scheme in ("first", "never"), "the pre-tokenizer adds spaces")
    flags |= SPACE_AT_START if scheme == "first" else 0
    return (SPACES if metaspace.get("split", True) else WHOLE), flags


def pack_tokenizer(text: str | bytes) -> tuple[bytes | None, str]:
    """The packed section, or None and the reason."""
    try:
        return _pack(json.loads(text)), ""
    except _Unsupported as reason:
        return None, str(reason)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return None, f"tokenizer.json has an unknown form ({error!r})"


def _pack(tokenizer: Node) -> bytes:
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    _check(model.get("type", "BPE") == "BPE", "the tokenizer is not a BPE")
    options = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    _check(not any(model.get(o) for o in options), "the tokenizer's BPE has options it lacks")
    added = tokenizer["added_tokens"]
    touching = ("lstrip", "rstrip", "single_word")
    _check(not any(t.get(f) for t in added for f in touching), "an added token has conditions")
    marked = bool(model.get("byte_fallback"))
    words, flags = (_sentence_piece if marked else _byte_level)(tokenizer)
    normalized = tokenizer.get("normalizer") is not None and any(t["normalized"] for t in added)
    _check(not normalized, "an added token is looked for in normalized text")
    affixes = postprocessors.build(tokenizer.get("post_processor"))
    _check(not affixes.after, "the tokenizer adds tokens after a text")

    by_id = {token["id"]: token["content"] for token in added}
    alphabet = {chr(code): byte for byte, code in byte_alphabet().items()}
    pieces = [b""] * (1 + max([*vocabulary.values(), *by_id]))
    byte_tokens = [NO_TOKEN] * 256
    index = []
    for piece, id_ in vocabulary.items():
        if id_ in by_id:
            continue
        if marked:
            byte = byte_token(piece)
            _check(" " not in piece, f"token {piece!r} holds a space")
            pieces[id_] = byte or piece.replace(MARK, " ").encode()
            if byte:
                byte_tokens[byte[0]] = id_
                continue
        else:
            _check(
                all(c in alphabet for c in piece), f"token {piece!r} is not of the byte alphabet"
            )
            pieces[id_] = bytes(alphabet[c] for c in piece)
        index.append(id_)
    for id_, content in by_id.items():
        pieces[id_] = content.encode()
    if marked:
        _check(NO_TOKEN not in byte_tokens, "the vocabulary lacks tokens of bytes")
    else:
        byte_tokens = [vocabulary.get(chr(byte_alphabet()[b]), NO_TOKEN) for b in range(256)]
    index.sort(key=lambda id_: pieces[id_])
    if not marked and not flags & WHOLE_WORDS:
        index = []  # nothing is looked up by its bytes

    merges = []
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((vocabulary[left], vocabulary[right], rank, vocabulary[left + right]))
    # Of two merges of one pair the last counts, as in a dictionary.
    unique = {merge[:2]: merge for merge in merges}
    packed_merges = [word for pair in sorted(unique) for word in unique[pair]]
    offsets = [0]
    for packed in pieces:
        offsets.append(offsets[-1] + len(packed))
    special = [t["id"] for t in added if t["special"]]
    ordinary = [t["id"] for t in added if not t["special"]]
    lists = (offsets, packed_merges, index, special, ordinary, affixes.before, byte_tokens)
    body = [word for part in lists for word in part]
    counts = (len(unique), len(index), len(special), len(ordinary), len(affixes.before))
    header = (VERSION, len(pieces), *counts, words, flags, offsets[-1])
    return struct.pack(f"<10I{len(body)}I", *header, *body) + b"".join(pieces)
