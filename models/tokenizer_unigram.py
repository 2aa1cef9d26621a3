"""``tokenizer.json`` of SentencePiece's Unigram out of a GGUF file, which calls it "t5"."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
MARK = "▁"


def components(
    pieces: Sequence[str],
    scores: Sequence[float],
    unknown: int,
    charsmap: bytes,
    *,
    prefix: bool,
    collapse: bool,
) -> Json:
    """What stands beside the added tokens and the post-processor.

    charsmap: SentencePiece's table of replacements; empty: none.
    prefix: a text begins with a space of the tokenizer's own.
    collapse: several white spaces count as one, those at the ends as none.
    """
    scheme = "always" if prefix else "never"
    marks = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": True}
    replaced = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }
    words: list[Json] = [{"type": "WhitespaceSplit"}, marks] if collapse else [marks]
    return {
        "normalizer": replaced if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "decoder": marks,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[piece, float(score)] for piece, score in zip(pieces, scores, strict=True)],
            "byte_fallback": False,
        },
    }
