"""``tokenizer.json`` of BERT's WordPiece out of a GGUF file's metadata.

GGUF marks what begins a word by "▁" where BERT's own vocabulary marks what goes on by "##".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketslm.errors import TokenizerError

_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4
Json = dict[str, Any]


def with_own_marks(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with the vocabulary as BERT's own files spell it."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{n}") for n in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return dict(metadata)  # refused where it is read
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [None] * len(tokens)
    own = [_own(token, kind) for token, kind in zip(tokens, types, strict=True)]
    return {**metadata, "tokenizer.ggml.tokens": own}


def _own(token: str, kind: Any) -> str:
    if token.startswith("▁") and token != "▁":
        return token[1:]
    special = token.startswith("[") and token.endswith("]")
    return token if special or kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) else f"##{token}"


def components(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> Json:
    """What stands beside the added tokens; ``ids`` of the vocabulary in its own spelling.

    A vocabulary without a capital letter is one of lower case: GGUF does not say so itself.
    Raises TokenizerError where it has no tokens for the ends of a text.
    """
    unknown = _special(metadata, ids, ("unknown",), "[UNK]")
    first = _special(metadata, ids, ("cls", "bos"), "[CLS]")
    last = _special(metadata, ids, ("seperator",), "[SEP]")  # GGUF's spelling
    words = (token for token in ids if not token.startswith("["))
    lowercase = not any(character.isupper() for word in words for character in word)

    def special(token: str, type_id: int) -> Json:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    single = [special(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(last, 0)]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, special(last, 1)]
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *second],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in (first, last)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": dict(ids),
        },
    }


def _special(
    metadata: Mapping[str, Any], ids: Mapping[str, int], keys: tuple[str, ...], usual: str
) -> str:
    """The token with a role, by its id under one of the keys or by its usual name."""
    tokens = list(ids)
    for key in keys:
        id_ = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(id_, int) and 0 <= id_ < len(tokens):
            return tokens[id_]
    if usual in ids:
        return usual
    raise TokenizerError(
        f"GGUF: no tokenizer.ggml.{keys[0]}_token_id and no token {usual!r}; expected one of them; "
        "convert the model again"
    )
