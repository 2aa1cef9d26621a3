"""Tokenizer files of every style of the field, small, and their references."""

from __future__ import annotations

import base64
import functools
import json
import math
import random
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocketslm.models.tokenizer_files import _PRE
from pocketslm.runtime.tokenizer import (
    Tokenizer,
    load_tokenizer_files,
)

IMPLEMENTATIONS = ("tokenizers", "python")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ORDINARY_ADDED = ["<tool_call>", "im_end"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 1234567 times faster than they'll say.",
    "Größe, façade, naïve, Ångström — “quoted” text… and we've 3 €, 4 £ and ½ of the rest!",
    "Привет, мир! Быстрая коричневая лиса перепрыгивает через ленивую собаку.",
    "これは日本語の文章です。東京は大きな都市です。한국어 문장도 있습니다.",
    "def main(argv):\n    for i in range(10):\n\t\tprint(i ** 2)\r\n\n\n    return None  # done\n",
    "emoji 😀😃 👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 e\u0301 o\u0308 \u200b zero width <|im_end|> <html> [x] {y}",
] * 3

AWKWARD = [
    *SPECIAL,
    *ORDINARY_ADDED,
    *(" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\ufeff"),
    *("▁", "▁▁", "Ġ", "<0x41>", "'s", "'S", "'ſ", "'ll", "123", "٣٤", "½", "²", "Ⅷ", "\u1e9e"),
    *("😀", "👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "é", "\u0301", "ǅ", "가", "가", "龥", "\U00031350"),
    *("<|im", "_end|>", "<", ">", "|", "don't", "WE'RE", "ab", "the quick", "//", "...\n"),
]
HARD = [
    *AWKWARD,
    *CORPUS,
    *("7", " 7", "  7", "12", "12345", "1234567", "3.14", "١٢٣٤", "a1b22c333", "\t12", "\n 5"),
    *(
        "\n\n",
        "\n\n\n",
        " \n",
        "\n ",
        "\r",
        "\t\t",
        "   x",
        "a  b",
        "  ",
        "\u3000\u3000x",
        " \x0b ",
    ),
    *(
        "العربية",
        "بِسْمِ",
        "עברית",
        "हिन्दी",
        "தமிழ்",
        "ไทย",
        "한국어",
        "中文字符",
        "カタカナ",
        "ひらがな",
    ),
    *("iPhone", "XMLHttpRequest", "ÉCOLE", "école", "ŒUVRE's", "I'M", "you'Ve", "'", "''s", "'d "),
    *("/x/y//\n/", "</td>", "<h1>", "<bos>", "<start_of_turn>", "<think>", "[CLS]", "##ing", "_a_"),
    *(
        "e\u0301\u0323",
        "\u0301",
        "a\u200db",
        "\u202e",
        "\u00ad",
        "\x7f",
        "\x00",
        "\ufffd",
        "\U0010ffff",
    ),
    *(
        "for(i=0;i<n;++i){\n\tx[i]+=1;\n}\n",
        "SELECT * FROM t;--",
        "https://a.b/c?d=e&f#g",
        "$x^2$",
        "§ 3",
    ),
    *("x" * 101, "a" * 1000, " " * 70 + "end", "\n" * 70, "ab " * 50, "🙂" * 20),
]


def hard_texts(count: int, seed: int = 1) -> list[str]:
    """`HARD`, and `count` texts put together from it at random."""
    rng = random.Random(seed)
    mixed = ("".join(rng.choices(HARD, k=rng.randint(1, 8))) for _ in range(count))
    return [*HARD, *mixed]


# Fixed examples: `tokenizers` carries older Unicode tables for its normalizers than Python does,
# so a random search comes, once in ten thousand texts, across a mark that only one of them knows.
FUZZ = settings(deadline=None, derandomize=True)
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=8).map("".join)


def split(*patterns: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    return sequence("pretokenizers", *steps, BYTE_LEVEL | {"use_regex": False})


def sequence(key: str, *members: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(members)}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
MARK_TO_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK = ({"type": "ByteFallback"}, {"type": "Fuse"})
LLAMA2_DECODER = sequence("decoders", MARK_TO_SPACE, *FALLBACK, STRIP)


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


BYTE_STYLES: dict[str, dict[str, Any]] = {
    "gpt2": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "smollm": {
        "pre_tokenizer": sequence(
            "pretokenizers", {"type": "Digits", "individual_digits": True}, BYTE_LEVEL
        )
    },
    "digits-grouped": {
        "pre_tokenizer": sequence(
            "pretokenizers", {"type": "Digits", "individual_digits": False}, BYTE_LEVEL
        )
    },
    "llama3": {"pre_tokenizer": split(_PRE["llama-bpe"].splits[0]), "ignore_merges": True},
    "qwen2": {"pre_tokenizer": split(_PRE["qwen2"].splits[0]), "normalizer": {"type": "NFC"}},
    **{
        name: {"pre_tokenizer": split(*_PRE[pre].splits), "ignore_merges": _PRE[pre].ignore_merges}
        for name, pre in (
            ("qwen35", "qwen35"),
            ("gpt4o", "gpt-4o"),
            ("tekken", "tekken"),
            ("minicpm5", "minicpm5"),
            ("deepseek3", "deepseek-v3"),
        )
    },
    "nested-class": {"pre_tokenizer": split(r" ?[^(\s|[.,!?…。，、।۔،])]+")},
    "possessive": {
        "pre_tokenizer": split(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}|[\w-]+|[\x{2028}\u3000]|^\S")
    },
    "lowercase": {
        "pre_tokenizer": BYTE_LEVEL,
        "normalizer": sequence(
            "normalizers",
            {"type": "NFKC"},
            {"type": "Lowercase"},
            {"type": "Strip", "strip_left": True, "strip_right": True},
        ),
    },
    **{
        f"split-{behavior}-{invert}": {
            "pre_tokenizer": sequence(
                "pretokenizers",
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\s+|\p{P}"},
                    "behavior": behavior,
                    "invert": invert,
                },
                BYTE_LEVEL | {"use_regex": False},
            )
        }
        for behavior in (
            "Removed",
            "MergedWithPrevious",
            "MergedWithNext",
            "Contiguous",
            "Isolated",
        )
        for invert in (False, True)
    },
}
MARK_STYLES: dict[str, dict[str, Any]] = {
    "llama2": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, SPACE_TO_MARK),
        "decoder": LLAMA2_DECODER,
    },
    "gemma": {
        "normalizer": SPACE_TO_MARK,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": sequence("decoders", MARK_TO_SPACE, *FALLBACK),
    },
    "metaspace-first": {"pre_tokenizer": metaspace("first", False), "decoder": LLAMA2_DECODER},
    "metaspace-always": {
        "pre_tokenizer": metaspace("always", True),
        "decoder": metaspace("always", True),
    },
    "metaspace-never": {
        "pre_tokenizer": metaspace("never", True),
        "decoder": metaspace("never", True),
    },
    "no-fallback": {
        "pre_tokenizer": metaspace("first", True),
        "decoder": LLAMA2_DECODER,
        "byte_fallback": False,
    },
    "no-fallback-no-fuse": {
        "pre_tokenizer": metaspace("first", True),
        "decoder": LLAMA2_DECODER,
        "byte_fallback": False,
        "fuse_unk": False,
    },
}


@functools.cache
def charsmap(rules: str) -> bytes:
    """SentencePiece's table of replacements for the rules of this name."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=rules)
    # Field 3 of the model is the normalizer, whose field 2 is the table: tag, length, bytes.
    model = normalizer.serialized_model_proto()
    at = model.index(rules.encode()) + len(rules)
    assert model[at] == 2 << 3 | 2
    length = shift = 0
    while True:
        at += 1
        length |= (model[at] & 127) << shift
        shift += 7
        if model[at] < 128:
            return model[at + 1 : at + 1 + length]


def precompiled(rules: str) -> dict[str, Any]:
    table = base64.b64encode(charsmap(rules)).decode()
    return {"type": "Precompiled", "precompiled_charsmap": table}


def regex(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_WORDS = sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace("always", True))
_MARKED = {"pre_tokenizer": metaspace("always", True), "decoder": metaspace("always", True)}
UNIGRAM_STYLES: dict[str, dict[str, Any]] = {
    "xlm-r": {"normalizer": precompiled("nmt_nfkc"), **_MARKED, "pre_tokenizer": _WORDS},
    "xlm-r-nfkc": {
        "normalizer": sequence(
            "normalizers", regex(r"[\n\r\t]", " "), regex(r" {2,}", " "), {"type": "NFKC"}
        ),
        **_MARKED,
        "pre_tokenizer": _WORDS,
    },
    "deberta": {
        "normalizer": sequence(
            "normalizers",
            {"type": "Strip", "strip_left": True, "strip_right": True},
            precompiled("nmt_nfkc"),
            regex(" {2,}", " "),
        ),
        **_MARKED,
    },
    "t5": {
        "normalizer": sequence("normalizers", precompiled("nmt_nfkc_cf"), regex(" {2,}", "▁")),
        "pre_tokenizer": metaspace("first", True),
        "decoder": metaspace("first", True),
    },
    "unigram-bytes": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, SPACE_TO_MARK),
        "decoder": LLAMA2_DECODER,
        "byte_fallback": True,
    },
}
STYLES = {**BYTE_STYLES, **MARK_STYLES, **UNIGRAM_STYLES}


@functools.cache
def trained(marks: bool) -> dict[str, Any]:
    """A small tokenizer.json trained by `tokenizers`: byte-level, or with marks and bytes.

    It is trained across words, so that ids show where words end.
    """
    if marks:
        model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet: list[str] = []
    else:
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        special = SPECIAL
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*CORPUS, *hard_texts(600, seed=3)], trainer)
    document: dict[str, Any] = json.loads(model.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in SPECIAL]
    # As in real files, no merges lead to an added token.
    added = {*SPECIAL, *ORDINARY_ADDED}
    document["model"]["merges"] = [
        merge for merge in document["model"]["merges"] if not added & {*merge, "".join(merge)}
    ]
    ids = dict(document["model"]["vocab"])
    for content in ORDINARY_ADDED:
        id_ = ids.setdefault(content, len(ids))
        token = document["added_tokens"][0] | {"id": id_, "content": content}
        document["added_tokens"].append(token | {"special": False})
    return document


@functools.cache
def document(style: str) -> str:
    """The tokenizer.json of a style."""
    if style in UNIGRAM_STYLES:
        return _unigram(style)
    marks = style in MARK_STYLES
    change = dict(STYLES[style])
    whole = json.loads(json.dumps(trained(marks)))
    for key in ("ignore_merges", "byte_fallback", "fuse_unk"):
        default = marks and key != "ignore_merges"
        whole["model"][key] = change.pop(key, default)
    whole |= {"normalizer": None, "pre_tokenizer": None, "decoder": BYTE_LEVEL} | change
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return json.dumps(whole)


def _unigram(style: str) -> str:
    """The tokens of a BPE with made-up scores, of which many are equal."""
    whole = json.loads(json.dumps(trained(True)))
    vocab = whole["model"]["vocab"]
    pieces = [piece for piece in vocab if len(piece) < 40 and piece not in ORDINARY_ADDED]
    ids = {piece: id_ for id_, piece in enumerate([*pieces, *ORDINARY_ADDED])}
    vocab = [
        (piece, 0.0 if piece in SPECIAL else -round(math.log(2 + ids[piece]), 1))
        for piece in pieces
    ]
    change = dict(UNIGRAM_STYLES[style])
    fallback = change.pop("byte_fallback", False)
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": fallback}
    for token in whole["added_tokens"]:
        token["id"] = ids[token["content"]]
        token["normalized"] = token["content"] == "<unk>" and style == "deberta"
        token["lstrip"] = token["content"] == "<|user|>"
    sides = [{"SpecialToken": {"id": id_, "type_id": 0}} for id_ in ("<s>", "</s>")]
    text = [sides[0], {"Sequence": {"id": "A", "type_id": 0}}, sides[1]]
    named = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("<s>", "</s>")}
    whole |= {"normalizer": None, "pre_tokenizer": None, **change}
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": text,
        "pair": text,
        "special_tokens": named,
    }
    del whole["model"]
    return json.dumps(whole | {"model": model})  # last, as in Hugging Face's files


@functools.cache
def word_piece(lowercase: bool = True) -> str:
    """A small tokenizer.json of BERT's kind, with the padding and truncation of an encoder."""
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1500, special_tokens=BERT_SPECIAL, show_progress=False
    )
    model.train_from_iterator([*CORPUS, *hard_texts(600, seed=3)], trainer)
    model.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    model.decoder = decoders.WordPiece()
    model.enable_truncation(16)
    model.enable_padding(length=16)
    return model.to_str()


@functools.cache
def loaded(style: str, implementation: Any) -> Tokenizer:
    return load_tokenizer_files({"tokenizer.json": document(style)}, implementation)


@functools.cache
def oracle(style: str, parse_special: bool) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(document(style))
    reference.encode_special_tokens = not parse_special
    if style in UNIGRAM_STYLES and not parse_special:  # its model would find the pieces
        model = json.loads(document(style))["model"]
        vocab = [("" if piece in SPECIAL else piece, score) for piece, score in model["vocab"]]
        reference.model = models.Unigram(vocab, model["unk_id"], model["byte_fallback"])
    return reference


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
