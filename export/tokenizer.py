"""The tokenizer files of a bundle: what a checkpoint says in several places, said once.

Every reader of a bundle, ours or not, then finds the same tokens and the same ends: the runtime,
`pocketslm-run`, onnxruntime-genai and ExecuTorch's runner read different files of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import load_tokenizer_files
from pocketslm.runtime.tokenizer.fields import parse_object
from pocketslm.runtime.tokenizer.identity import (
    NAMED,
    TOKEN_LISTS,
    special_names,
    with_added_tokens,
)

_TOKENIZER, _CONFIG, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_GENERATION, _MODEL = "generation_config.json", "config.json"
_NAMES_SHOWN = 5


def settled(
    files: Mapping[str, bytes], rows: int, *, generates: bool = True
) -> tuple[dict[str, bytes], list[str]]:
    """The files of a bundle for a model of `rows` tokens, and notes on what was changed.

    `tokenizer.json` has all added tokens and none that the model has no row for, and
    `generation_config.json` the ids that end an answer: the checkpoint's, and the token that closes
    the assistant's turn in the chat template, where the model `generates` answers. What this makes
    superfluous is left out.
    Raises `TokenizerError` for files that cannot be read or do not fit together.
    """
    tokenizer = load_tokenizer_files(files)
    identity = tokenizer.identity
    notes = []
    document, config, special_map, generation = (
        parse_object(files[name].decode(), name) if name in files else {}
        for name in (_TOKENIZER, _CONFIG, _MAP, _GENERATION)
    )
    whole: dict[str, Any] = with_added_tokens(document, config, special_map)
    left_out = {id_: text for id_, text in tokenizer.texts.items() if id_ >= rows}
    if any(id_ in left_out for id_ in tokenizer.affixes):
        raise TokenizerError(
            f"the tokenizer adds tokens that the model has no row for ({rows} rows); expected "
            "smaller ids; use the tokenizer that belongs to the weights"
        )
    if left_out:
        whole = _without(whole, set(left_out.values()), rows)
        notes.append(f"tokens that the model has no row for were left out: {_listed(left_out)}")

    eos = list(identity.eos)
    if (end := tokenizer.turn_end()) is not None and end not in eos:
        eos.append(end)
        if identity.eos:
            notes.append(
                f"an answer also ends with {tokenizer.texts[end]!r}, which closes the assistant's "
                "turn in the chat template"
            )
    if beyond := [id_ for id_ in eos if id_ >= rows]:
        notes.append(f"ids that the model has no row for do not end an answer: {beyond}")
        eos = [id_ for id_ in eos if id_ < rows]
    if not eos and generates:
        notes.append("no file says which token ends an answer; only a limit or a stop text does")
    ids: dict[str, Any] = {"eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    for role in ("bos", "pad"):
        id_ = getattr(identity, role)
        ids[f"{role}_token_id"] = id_ if id_ is None or id_ < rows else None

    names = special_names(config, special_map)
    names = {key: text for key, text in names.items() if text not in left_out.values()}
    out = {name: data for name, data in files.items() if name not in (_MAP, _MODEL)}
    if whole != document:
        out[_TOKENIZER] = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    if (settled_config := _settled(config, names, set(left_out.values()))) != config:
        out[_CONFIG] = _dump(settled_config)
    if any(generation.get(key) != value for key, value in ids.items()):
        out[_GENERATION] = _dump({k: v for k, v in (generation | ids).items() if v is not None})
    return out, notes


def _settled(
    config: Mapping[str, Any], names: Mapping[str, str], left_out: set[str]
) -> dict[str, Any]:
    """`tokenizer_config.json` without what `tokenizer.json` says now."""
    changed = {
        key: value
        for key, value in config.items()
        if key != "added_tokens_decoder" and (key not in NAMED or key in names)
    }
    for key, text in names.items():
        known = changed.get(key)
        if (known.get("content") if isinstance(known, dict) else known) != text:
            changed[key] = text
    for key in TOKEN_LISTS:
        if isinstance(listed := changed.get(key), list):
            texts = [one.get("content") if isinstance(one, dict) else one for one in listed]
            changed[key] = [
                token
                for token, text in zip(listed, texts, strict=True)
                if not (isinstance(text, str) and text in left_out)
            ]
    return changed


def _without(document: Mapping[str, Any], texts: set[str], rows: int) -> dict[str, Any]:
    """`tokenizer.json` without these tokens and the merges that lead to or from them."""
    model = document["model"]
    gone: set[str] = set()
    if model.get("type") == "Unigram":  # a list by id
        changed = {**model, "vocab": model["vocab"][:rows]}
    else:
        vocabulary = {text: id_ for text, id_ in model["vocab"].items() if id_ < rows}
        changed = {**model, "vocab": vocabulary}
        gone = model["vocab"].keys() - vocabulary.keys()
    if gone and "merges" in model:
        changed["merges"] = [
            merge
            for merge in model["merges"]
            if gone.isdisjoint(pair := merge.split(" ") if isinstance(merge, str) else merge)
            and "".join(pair) not in gone
        ]
    added = [token for token in document["added_tokens"] if token["content"] not in texts]
    return {**document, "added_tokens": added, "model": changed}


def _listed(tokens: Mapping[int, str]) -> str:
    shown = [f"{tokens[id_]!r} ({id_})" for id_ in sorted(tokens)[:_NAMES_SHOWN]]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
