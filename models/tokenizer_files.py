"""Tokenizer files, as Hugging Face writes them, out of a GGUF file's metadata.

GGUF keeps the vocabulary and the *name* of the pre-tokenizer (`tokenizer.ggml.pre`); what a name
means is in llama.cpp's `src/llama-vocab.cpp`, https://github.com/ggml-org/llama.cpp. `_PRE` holds
those of them that small models use, in the form that the models' own `tokenizer.json` has.
SentencePiece vocabularies carry scores and no merges; the merges are rebuilt from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pocketslm.collector import no_collection
from pocketslm.errors import TokenizerError
from pocketslm.models import tokenizer_unigram, tokenizer_word_piece
from pocketslm.models.pretokenizer_guess import guess_pretokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""

Json = dict[str, Any]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3_WORDS = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_LINES}"
QWEN2_WORDS = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}|{_LINES}"
THREE_DIGITS = r"\p{N}{1,3}"
MINICPM5_WORDS = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}+|{_LINES}"
QWEN35_WORDS = (
    rf"{_CONTRACTIONS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_LINES}"
GPT4O_WORDS = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_LINES}"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EAST_ASIAN = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK3_WORDS = (
    r'[!"#$%&'
    r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """What a pre-tokenizer name means: `splits` in turn, then the byte alphabet."""

    splits: tuple[str, ...] = ()
    digits: bool = False  # every digit alone, before anything else
    gpt2: bool = False  # GPT-2's own pattern last
    ignore_merges: bool = False  # a word that is a token is that token
    add_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise
    nfc: bool = False  # Unicode normalization form C first


_GPT2 = _Pre(gpt2=True)
_DIGITS = _Pre(digits=True, gpt2=True)
_LLAMA_BPE = _Pre((LLAMA3_WORDS,), ignore_merges=True, add_bos=True)
_DEEPSEEK3 = _Pre((THREE_DIGITS, EAST_ASIAN, DEEPSEEK3_WORDS))
_PRE = {
    "default": _Pre((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral"), _LLAMA_BPE
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Pre((LLAMA3_WORDS,))),
    "minicpm5": _Pre((THREE_DIGITS, MINICPM5_WORDS), ignore_merges=True),
    "qwen2": _Pre((QWEN2_WORDS,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _Pre((QWEN2_WORDS,))),
    "qwen35": _Pre((QWEN35_WORDS,), nfc=True),
    "tekken": _Pre((TEKKEN_WORDS,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _Pre((GPT4O_WORDS,))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
}
_MODELS = ("gpt2", "llama", "gemma4", "bert", "t5")
_ROLES = (  # tokenizer.ggml.<role>_token_id, and its name in a token's role here
    ("bos", "bos"),
    ("eos", "eos"),
    ("eot", "eot"),
    ("eom", "eom"),
    ("unknown", "unk"),
    ("padding", "pad"),
)


@no_collection()
def tokenizer_files_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """File name -> content, from metadata key -> value.

    Always `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`; also
    `chat_template.jinja` where the file has a template.
    Raises `TokenizerError` for a vocabulary or a pre-tokenizer of an unknown kind, and for
    metadata that is missing or does not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "bert":
        metadata = tokenizer_word_piece.with_own_marks(metadata)
    vocabulary = _Vocabulary(metadata)
    gemma4 = kind == "gemma4" or (kind == "gpt2" and metadata.get("tokenizer.ggml.pre") == "gemma4")
    if gemma4:
        document, add_bos = _marked(vocabulary, _merges(metadata), prefix=False), True
    elif kind == "gpt2":
        document, add_bos = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        document, add_bos = _sentence_piece(metadata, vocabulary), True
    elif kind == "bert":
        parts = tokenizer_word_piece.components(metadata, vocabulary.ids)
        document, add_bos = _document(vocabulary, **parts), False
    elif kind == "t5":
        document, add_bos = _unigram(metadata, vocabulary), False
    else:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.model {kind!r} is not supported; supported: "
            f"{', '.join(_MODELS)}; use the model's Hugging Face checkpoint"
        )
    # Gemma 4's first files say that it needs no BOS, wrongly.
    add_bos = gemma4 or _flag(metadata, "add_bos_token", add_bos)
    add_eos = _flag(metadata, "add_eos_token", kind == "t5")
    document.setdefault(
        "post_processor",
        _template(vocabulary, "bos" if add_bos else None, "eos" if add_eos else None),
    )
    document["model"] = document.pop("model")  # last, as in Hugging Face's files
    config: Json = {
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{name}_token": vocabulary.tokens[id_]
            for name, id_ in vocabulary.named.items()
            if name in ("bos", "eos", "unk", "pad")
        },
    }
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    files = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        "tokenizer_config.json": _dump(config),
        "generation_config.json": _dump(_generation(vocabulary)),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    return files


def tokenizer_notes(metadata: Mapping[str, Any]) -> list[str]:
    """What `tokenizer_files_from_gguf` reads otherwise than the metadata says it, in words."""
    notes = []
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    for role, _ in _ROLES:
        id_ = metadata.get(key := f"tokenizer.ggml.{role}_token_id")
        if _is_unset(role, id_, count):
            notes.append(f"{key} is {id_}, which is no token, and was ignored")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and not metadata.get("tokenizer.ggml.pre"):
        with suppress(TokenizerError):  # reading the tokenizer says what is wrong with it
            guess = _guessed(_Vocabulary(metadata))
            notes.append(f"tokenizer.ggml.pre is missing; by its vocabulary it is {guess!r}")
    return notes


def _is_unset(role: str, id_: object, count: int) -> bool:
    """Whether an id stands for none: -1 as it is stored, or out of range where nothing needs it."""
    if not isinstance(id_, int) or 0 <= id_ < count:
        return False
    return id_ in (-1, 2**32 - 1) or role in ("padding", "unknown")


class _Vocabulary:
    """Tokens, their types and the tokens with a role (`bos`, `eos`, `eot`, ...)."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokens: list[str] = _list(metadata, "tokens", str, None)
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for id_, t in enumerate(self.tokens) if self.ids[t] != id_)
            raise TokenizerError(
                f"GGUF: tokenizer.ggml.tokens has {twice!r} twice; expected each token once; "
                "convert the model again"
            )
        count = len(self.tokens)
        self.named: dict[str, int] = {}
        for key, name in _ROLES:
            id_ = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if id_ is None or _is_unset(key, id_, count):
                continue
            if not isinstance(id_, int) or not 0 <= id_ < count:
                raise TokenizerError(
                    f"GGUF: tokenizer.ggml.{key}_token_id is {id_!r}; expected 0 to {count - 1}; "
                    "convert the model again"
                )
            self.named[name] = id_
        if "tokenizer.ggml.token_type" in metadata:
            self.types: list[int] = _list(metadata, "token_type", int, count)
        else:
            special = set(self.named.values())
            self.types = [CONTROL if id_ in special else NORMAL for id_ in range(count)]
        # GGUF cannot say that an added token takes the white space after it along. Phi-3's do.
        kind = (metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model"))
        self.rstrip = kind == ("phi3", "llama")

    def ordinary(self) -> list[str]:
        """The tokens that training made."""
        pairs = zip(self.tokens, self.types, strict=True)
        return [token for token, kind in pairs if token and kind == NORMAL]

    def added(self) -> list[Json]:
        """`added_tokens`: control and unknown tokens are special, user-defined ones are not."""
        return [
            {
                "id": id_,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": self.rstrip and token not in ("<unk>", "<s>", "<|endoftext|>"),
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for id_, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Json, bool]:
    """`tokenizer.json` of a byte-level vocabulary, and whether texts begin with BOS."""
    name = metadata.get("tokenizer.ggml.pre") or _guessed(vocabulary)
    pre = _PRE.get(name) if isinstance(name, str) else None
    if pre is None:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.pre {name!r} is unknown; known: {', '.join(sorted(_PRE))}; "
            "use the model's Hugging Face checkpoint"
        )
    steps: list[Json] = []
    if pre.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    steps += [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in pre.splits
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append({**level, "use_regex": pre.gpt2})
    model = _model(vocabulary, _merges(metadata), ignore_merges=pre.ignore_merges)
    document = _document(
        vocabulary,
        normalizer={"type": "NFC"} if pre.nfc else None,
        pre_tokenizer=steps[0] if len(steps) == 1 else _sequence("pretokenizers", steps),
        decoder={**level, "add_prefix_space": True, "use_regex": True},
        model=model,
    )
    return document, pre.add_bos


def _merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    return [_pair(merge) for merge in _list(metadata, "merges", str, None)]


def _guessed(vocabulary: _Vocabulary) -> str:
    """The pre-tokenizer's name where metadata has none."""
    name = guess_pretokenizer(vocabulary.ordinary())
    if name is None:
        raise TokenizerError(
            "GGUF: tokenizer.ggml.pre is missing, and the vocabulary does not tell how words are "
            "cut; expected the name of a pre-tokenizer; convert the model again, or use its "
            "Hugging Face checkpoint"
        )
    return name


def _pair(merge: str) -> list[str]:
    """The two tokens of a merge, which stand in one string with a space between them."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.merges has {merge[:80]!r}; expected two tokens with a space "
            "between them; convert the model again"
        )
    return [merge[:cut], merge[cut + 1 :]]


def _sentence_piece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Json:
    """`tokenizer.json` of a SentencePiece BPE vocabulary, as Llama 2 and Gemma have it."""
    scores = _list(metadata, "scores", (int, float), len(vocabulary.tokens))
    merges = merges_from_scores(vocabulary.tokens, vocabulary.types, scores)
    return _marked(vocabulary, merges, prefix=_flag(metadata, "add_space_prefix", True))


def _unigram(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Json:
    """`tokenizer.json` of a SentencePiece Unigram, without the rows that fill up the vocabulary."""
    scores = _list(metadata, "scores", (int, float), len(vocabulary.tokens))
    count = len(vocabulary.tokens)
    while count and vocabulary.types[count - 1] == UNUSED:
        count -= 1
    unknown = vocabulary.named.get("unk")
    if unknown is None or unknown >= count:
        raise TokenizerError(
            "GGUF: tokenizer.ggml.unknown_token_id names no token; expected what stands for text "
            "that no piece holds; convert the model again"
        )
    prefix = _flag(metadata, "add_space_prefix", True)
    collapse = _flag(metadata, "remove_extra_whitespaces", True)
    if collapse and not prefix:
        raise TokenizerError(
            "GGUF: tokenizer.ggml.add_space_prefix is false with remove_extra_whitespaces, which "
            "is not supported; expected true; use the model's Hugging Face checkpoint"
        )
    table: list[int] = []
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        table = _list(metadata, "precompiled_charsmap", int, None)
    parts = tokenizer_unigram.components(
        vocabulary.tokens[:count],
        scores[:count],
        unknown,
        bytes(byte & 0xFF for byte in table),
        prefix=prefix,
        collapse=collapse,
    )
    return _document(vocabulary, **parts)


def _marked(vocabulary: _Vocabulary, merges: list[list[str]], *, prefix: bool) -> Json:
    """`tokenizer.json` of a BPE over characters in which "▁" stands for a space.

    With `prefix` a text starts with a space of the tokenizer's own.
    """
    unknown = vocabulary.named.get("unk")
    if unknown is None and UNKNOWN in vocabulary.types:
        unknown = vocabulary.types.index(UNKNOWN)
    model = _model(
        vocabulary,
        merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)),
    )
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decode: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalize = [space]
    if prefix:
        normalize = [{"type": "Prepend", "prepend": "▁"}, space]
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        vocabulary,
        normalizer=_sequence("normalizers", normalize),
        pre_tokenizer=None,
        decoder=_sequence("decoders", decode),
        model=model,
    )


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """The merges, most urgent first, that a SentencePiece BPE vocabulary implies.

    SentencePiece joins the neighbours whose concatenation has the highest score, so every way to
    cut a token into two tokens is a merge with that token's score. Merges of one token get
    neighbouring ranks; SentencePiece would take the leftmost, which can differ only where two of
    them overlap in the text, as in a run of one letter.
    """
    mergeable = {
        token: id_
        for id_, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    merges = []
    for token in sorted(mergeable, key=lambda token: (-scores[mergeable[token]], mergeable[token])):
        ranked = []
        for cut in range(1, len(token)):
            left = mergeable.get(token[:cut])
            if left is not None and (right := mergeable.get(token[cut:])) is not None:
                ranked.append((left, right))
        merges += [[tokens[left], tokens[right]] for left, right in sorted(ranked)]
    return merges


def _document(vocabulary: _Vocabulary, **components: Json | None) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        **components,
    }


def _model(vocabulary: _Vocabulary, merges: list[list[str]], **options: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _sequence(key: str, members: list[Json]) -> Json:
    return {"type": "Sequence", key: members}


def _template(vocabulary: _Vocabulary, before: str | None, after: str | None) -> Json | None:
    """A post-processor that puts BOS before and EOS after a text; None if it would do nothing."""
    first, last = (vocabulary.named.get(name) if name else None for name in (before, after))
    if first is None and last is None:
        return None

    def special(id_: int | None, type_id: int) -> list[Json]:
        if id_ is None:
            return []
        return [{"SpecialToken": {"id": vocabulary.tokens[id_], "type_id": type_id}}]

    def sequence(letter: str, type_id: int) -> list[Json]:
        text = {"Sequence": {"id": letter, "type_id": type_id}}
        return [*special(first, type_id), text, *special(last, type_id)]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            (text := vocabulary.tokens[id_]): {"id": text, "ids": [id_], "tokens": [text]}
            for id_ in (first, last)
            if id_ is not None
        },
    }


def _generation(vocabulary: _Vocabulary) -> Json:
    """`generation_config.json`: generation ends at EOS, end of turn and end of message."""
    named = vocabulary.named
    ends = list(dict.fromkeys(named[name] for name in ("eos", "eot", "eom") if name in named))
    out: Json = {}
    if "bos" in named:
        out["bos_token_id"] = named["bos"]
    if ends:
        out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "pad" in named:
        out["pad_token_id"] = named["pad"]
    return out


def _list(
    metadata: Mapping[str, Any], key: str, kind: type | tuple[type, ...], count: int | None
) -> list[Any]:
    """The list `tokenizer.ggml.<key>` of `count` values of `kind`."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        found = "is missing" if value is None else "is not such a list"
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.{key} {found}; expected a list of {names}; "
            "use a GGUF file that has a tokenizer"
        )
    if count is not None and len(value) != count:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.{key} has {len(value)} entries; expected {count}, one per "
            "token; convert the model again"
        )
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.{key} is {value!r}; expected true or false; "
            "convert the model again"
        )
    return value


def _dump(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
