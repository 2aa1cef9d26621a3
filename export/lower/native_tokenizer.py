"""Pack tokenizer.json for ``pocketslm-run``, which has no reader of such files.

The runner covers BPE over bytes with the words of GPT-2 (digits apart or not), Llama 3, Qwen 2 and
3.5, MiniCPM 5, GPT-4o, Tekken and DeepSeek 3, SentencePiece's BPE with byte fallback (Llama 2,
Phi-3, Gemma) and BERT's WordPiece; for anything else these functions return a reason instead, and
the runner takes token ids. A Unigram without byte fallback is packed for Python alone, which
normalizes its texts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pocketslm.collector import no_collection
from pocketslm.errors import TokenizerError
from pocketslm.models import tokenizer_files as words_of
from pocketslm.runtime.tokenizer import normalizers, postprocessors
from pocketslm.runtime.tokenizer.decoders import byte_token
from pocketslm.runtime.tokenizer.pretokenizers import byte_alphabet, metaspace_scheme
from pocketslm.runtime.tokenizer.unigram import Unigram
from pocketslm.runtime.tokenizer.vocabulary import Vocabulary

VERSION = 3
NO_TOKEN = 2**32 - 1  # a byte that no text of the training data had; it encodes to nothing
MARK = "▁"
Node = Mapping[str, Any]

# As in runtime/ops/runner/words.h and tokenizer.h.
GPT2, GPT2_DIGITS, LLAMA3, QWEN2, WHOLE, SPACES = range(6)
MINICPM5, QWEN35, GPT4O, TEKKEN, DEEPSEEK3, BERT, UNIGRAM = range(6, 13)
WHOLE_WORDS, NFC, SPACE_ALWAYS, SPACE_AT_START, STRIP_SPACE = (1 << bit for bit in range(5))
CLEAN, IDEOGRAPHS, STRIP_ACCENTS, LOWERCASE, SPLIT_SPACES = (1 << bit for bit in range(5, 10))
SPECIAL, TAKES_SPACE_BEFORE, TAKES_SPACE_AFTER, MARKED = (1 << bit for bit in range(4))

_SPLITS = {
    (words_of.LLAMA3_WORDS,): LLAMA3,
    (words_of.QWEN2_WORDS,): QWEN2,
    (words_of.QWEN35_WORDS,): QWEN35,
    (words_of.GPT4O_WORDS,): GPT4O,
    (words_of.TEKKEN_WORDS,): TEKKEN,
    (words_of.THREE_DIGITS, words_of.MINICPM5_WORDS): MINICPM5,
    (words_of.THREE_DIGITS, words_of.EAST_ASIAN, words_of.DEEPSEEK3_WORDS): DEEPSEEK3,
}

_PREPEND = {"type": "Prepend", "prepend": MARK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_DECODE = [
    {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# Gemma's, which finds nothing: spaces are marks by then.
_SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


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
    options = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    _check(not any(tokenizer["model"].get(o) for o in options), "the BPE has unknown options")
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    _check([n["type"] for n in normalizers] in ([], ["NFC"]), "the tokenizer normalizes text")
    flags = (NFC if normalizers else 0) | (
        WHOLE_WORDS if tokenizer["model"].get("ignore_merges") else 0
    )
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    unknown = "the pre-tokenizer is of no known family"
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
    splits = tuple(_split(step, unknown, alone=len(words) == 2) for step in words[:-1])
    _check(splits in _SPLITS, unknown)
    return _SPLITS[splits], flags


def _split(step: Node, unknown: str, *, alone: bool) -> str:
    """The pattern of a `Split` that cuts a text into its matches and what is between them."""
    _check(step["type"] == "Split" and isinstance(step["pattern"].get("Regex"), str), unknown)
    # One pattern of a known family matches every character, so to keep the matches is the same.
    matches = step["behavior"] == "Removed" and step.get("invert") and alone
    _check(step["behavior"] == "Isolated" or matches, unknown)
    pattern: str = step["pattern"]["Regex"]
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _sentence_piece(tokenizer: Node) -> tuple[int, int]:
    """The words and flags of a BPE over characters with SentencePiece's marks."""
    normalizers = [dict(n) for n in _parts(tokenizer.get("normalizer"), "normalizers")]
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    decoders = [dict(d) for d in _parts(tokenizer.get("decoder"), "decoders")]
    _check(decoders in (_DECODE, [*_DECODE, _STRIP]), "the decoder is not SentencePiece's")
    options = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
    _check(not any(tokenizer["model"].get(o) for o in options), "the BPE has unknown options")
    flags = STRIP_SPACE if decoders[-1] == _STRIP else 0
    if not words or (words == [_SPLIT_AT_SPACES] and _REPLACE in normalizers):
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


def _bert(tokenizer: Node) -> tuple[int, int]:
    """The words and flags of BERT's WordPiece."""
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    known = [n["type"] for n in normalizers] == ["BertNormalizer"]
    _check(known and [w["type"] for w in words] == ["BertPreTokenizer"], "the words are not BERT's")
    prefix = tokenizer["model"].get("continuing_subword_prefix", "##")
    _check(prefix == "##", "the pieces of words are not BERT's")
    options = normalizers[0]
    lower = options.get("lowercase", True)
    strip = lower if options.get("strip_accents") is None else options["strip_accents"]
    return BERT, (
        STRIP_SPACE
        | CLEAN * bool(options.get("clean_text", True))
        | IDEOGRAPHS * bool(options.get("handle_chinese_chars", True))
        | STRIP_ACCENTS * bool(strip)
        | LOWERCASE * bool(lower)
    )


def _unigram(tokenizer: Node) -> tuple[int, int]:
    """The words and flags of a Unigram with SentencePiece's marks."""
    _check(not tokenizer["model"].get("byte_fallback"), "the Unigram falls back to bytes")
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    split = [word["type"] for word in words] == ["WhitespaceSplit", "Metaspace"]
    _check(split or [word["type"] for word in words] == ["Metaspace"], "the words are unknown")
    marks = words[-1]
    decoders = _parts(tokenizer.get("decoder"), "decoders")
    _check([d["type"] for d in decoders] == ["Metaspace"], "the decoder is not SentencePiece's")
    marked = all(node["replacement"] == MARK for node in (marks, *decoders))
    _check(marked and marks.get("split", True), "the pre-tokenizer has another mark, or no words")
    _, scheme = metaspace_scheme(dict(marks), "pre_tokenizer")
    if split:
        _check(scheme == "always", "the pre-tokenizer puts no mark before a word")
        return UNIGRAM, SPLIT_SPACES
    return UNIGRAM, {"always": SPACE_ALWAYS, "first": SPACE_AT_START, "never": 0}[scheme]


@no_collection()
def pack_tokenizer(text: str | bytes) -> tuple[bytes | None, str]:
    """The packed section, if there is one, and why the runner takes no text with it, or nothing."""
    try:
        tokenizer = json.loads(text)
        packed = _pack(tokenizer)
        unigram = tokenizer["model"].get("type") == "Unigram"
        return packed, "the tokenizer normalizes text as the runner cannot" if unigram else ""
    except (_Unsupported, TokenizerError) as reason:
        return None, str(reason)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return None, f"tokenizer.json has an unknown form ({error!r})"


def _pack(tokenizer: Node) -> bytes:
    model = tokenizer["model"]
    kind = model.get("type", "BPE")
    _check(kind in ("BPE", "Unigram", "WordPiece"), "the tokenizer is of an unknown kind")
    if kind == "Unigram":
        return _pack_unigram(tokenizer)
    added = tokenizer["added_tokens"]
    _check(not any(t.get("single_word") for t in added), "an added token has conditions")
    marked = bool(model.get("byte_fallback"))
    family = _bert if kind == "WordPiece" else _sentence_piece if marked else _byte_level
    words, flags = family(tokenizer)
    normalizes = _parts(tokenizer.get("normalizer"), "normalizers")
    normalized = normalizes and any(t["normalized"] for t in added)
    _check(not normalized, "an added token is looked for in normalized text")
    affixes = postprocessors.build(tokenizer.get("post_processor"))
    _check(words == BERT or not affixes.after, "the tokenizer adds tokens after a text")

    vocabulary: dict[str, int] = model["vocab"]
    by_id = {token["id"]: token["content"] for token in added}
    pieces = [b""] * (1 + max([*vocabulary.values(), *by_id]))
    byte_tokens = [NO_TOKEN] * 256
    index = []
    alphabet = {chr(code): byte for byte, code in byte_alphabet().items()}
    for piece, id_ in vocabulary.items():
        if id_ in by_id:
            continue
        if words == BERT:
            # A token that begins a word has the space before it.
            pieces[id_] = (piece[2:] if piece.startswith("##") else " " + piece).encode()
        elif marked:
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
        _check(not (marked and " " in content and MARK in content), "an added token mixes marks")
        pieces[id_] = (content.replace(MARK, " ") if marked else content).encode()
    if marked:
        _check(NO_TOKEN not in byte_tokens, "the vocabulary lacks tokens of bytes")
    elif words != BERT:
        byte_tokens = [vocabulary.get(chr(byte_alphabet()[b]), NO_TOKEN) for b in range(256)]
    index.sort(key=lambda id_: pieces[id_])
    if not (marked or words == BERT or flags & WHOLE_WORDS):
        index = []  # nothing is looked up by its bytes

    word_piece = (0, 0)
    if words == BERT:
        longest = model.get("max_input_chars_per_word", 100)
        _check(longest >= 0, "the longest word has fewer than no characters")
        word_piece = vocabulary[model["unk_token"]], min(longest, 2**32 - 1)
    merges = _merges(model, vocabulary)
    packed_added = [word for token in added for word in (token["id"], _added_flags(token, marked))]
    form = (words, flags, *word_piece)
    return _section(pieces, form, merges, index, packed_added, affixes, byte_tokens)


def _pack_unigram(tokenizer: Node) -> bytes:
    words, flags = _unigram(tokenizer)
    normalizer = normalizers.build(tokenizer.get("normalizer"))
    vocabulary = Vocabulary(tokenizer, normalizer)
    changed = any(t.content != vocabulary.normalized.get(t.id, t.content) for t in vocabulary.added)
    _check(not changed, "an added token is another in normalized text")
    unigram = Unigram(vocabulary)
    scores = dict(unigram.pieces.values())
    index = [id_ for piece, (id_, _) in unigram.pieces.items() if piece]
    for id_ in index:
        piece = vocabulary.texts[id_]
        _check(" " not in piece, f"token {piece!r} holds a space")
    texts = (vocabulary.texts.get(id_, "") for id_ in range(vocabulary.size))
    pieces = [text.replace(MARK, " ").encode() for text in texts]
    index.sort(key=lambda id_: pieces[id_])
    added = [word for t in vocabulary.added for word in (t.id, SPECIAL * t.special)]
    affixes = postprocessors.build(tokenizer.get("post_processor"))
    form = (words, flags, unigram.unknown, 0)
    packed = struct.pack(
        f"<{len(index) + 1}d", *(scores[id_] for id_ in index), unigram.unknown_score
    )
    return _section(pieces, form, [], index, added, affixes, [NO_TOKEN] * 256, packed)


def _section(
    pieces: list[bytes],
    form: tuple[int, int, int, int],
    merges: list[int],
    index: list[int],
    added: list[int],
    affixes: postprocessors.Affixes,
    byte_tokens: list[int],
    scores: bytes = b"",
) -> bytes:
    """The parts as runtime/ops/runner/tokenizer.cpp reads them.

    form: words, flags, the unknown token, characters of the longest word.
    """
    offsets = [0]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    lists = (offsets, merges, index, added, affixes.before, affixes.after, byte_tokens)
    body = [word for part in lists for word in part]
    counts = (len(merges) // 4, len(index), len(added) // 2)
    ends = (len(affixes.before), len(affixes.after))
    header = (VERSION, len(pieces), *counts, *ends, *form, offsets[-1])
    return struct.pack(f"<12I{len(body)}I", *header, *body) + scores + b"".join(pieces)


def _merges(model: Node, vocabulary: Mapping[str, int]) -> list[int]:
    """[left, right, rank, result] of each merge, by left and right."""
    pairs = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())
    ]
    ids = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    if not ids:
        return []
    lefts, rights, results = np.array(ids, np.int64).T
    # Of two merges of one pair the last counts, as in a dictionary.
    _, last = np.unique((lefts << 32 | rights)[::-1], return_index=True)
    rank = len(ids) - 1 - last
    table = np.stack([lefts[rank], rights[rank], rank, results[rank]], 1)
    words: list[int] = table.reshape(-1).tolist()
    return words


def _added_flags(token: Node, marked: bool) -> int:
    return (
        SPECIAL * bool(token["special"])
        | TAKES_SPACE_BEFORE * bool(token.get("lstrip"))
        | TAKES_SPACE_AFTER * bool(token.get("rstrip"))
        | MARKED * (marked and MARK in token["content"])
    )
