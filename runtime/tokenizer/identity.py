"""Who a model is: its special tokens, and the ids that begin a text and end an answer.

Hugging Face's folders say it in up to six files, and not always the same in each. The order here is
theirs. Ids come from `generation_config.json`, then `config.json`, then the tokenizer's named
tokens. Names come from `tokenizer_config.json` and, unless it has an `added_tokens_decoder`, from
`special_tokens_map.json` over it. Tokens are those of `tokenizer.json`, changed and joined by
`added_tokens_decoder` and by the named ones, which are special whatever `tokenizer.json` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer.vocabulary import listed_pieces

Json = Mapping[str, object]

_TOKEN_VARIABLE = re.compile(r"(?:[a-z]+_)?[a-z]+_token")
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKEN_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class Identity:
    """The ids with a role.

    bos: begins a text; eos: each of them ends an answer, the one that is written first; pad: fills
    up. None or empty where no file names one.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def read_identity(generation: Json, model: Json, named: Mapping[str, int]) -> Identity:
    """The identity from `generation_config.json`, `config.json` and the ids of named tokens.

    Raises `TokenizerError` for an id that is none.
    """
    text_model = model.get("text_config")  # of a model that also sees or hears
    sources = [("generation_config.json", generation), ("config.json", model)]
    if isinstance(text_model, dict):
        sources.append(("config.json", text_model))

    def first(role: str) -> tuple[int, ...]:
        key = f"{role}_token_id"
        for name, source in sources:
            ids = _ids(source.get(key), f"{name}: {key}", unset=role == "pad")
            if ids:
                return ids
        id_ = named.get(f"{role}_token")
        return () if id_ is None else (id_,)

    bos, pad = first("bos"), first("pad")
    return Identity(bos[0] if bos else None, first("eos"), pad[0] if pad else None)


def _ids(value: object, where: str, *, unset: bool) -> tuple[int, ...]:
    """An id or a list of ids; with `unset`, a negative one stands for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    found = [id_ for id_ in ids if type(id_) is int and (id_ >= 0 or unset)]
    if len(found) != len(ids):
        raise TokenizerError(
            f"{where} is {str(value)[:80]!r}; expected an id or a list of ids; "
            "fetch or export the file again"
        )
    return tuple(dict.fromkeys(id_ for id_ in found if id_ >= 0))


def special_names(config: Json, special_map: Json) -> dict[str, str]:
    """`bos_token` and its like -> the token's text."""
    found = {}
    for key, value in _merged_config(config, special_map).items():
        content = value.get("content") if isinstance(value, dict) else value
        if _TOKEN_VARIABLE.fullmatch(key) and isinstance(content, str):
            found[key] = content
    return found


def _merged_config(config: Json, special_map: Json) -> dict[str, object]:
    return {**config, **({} if "added_tokens_decoder" in config else special_map)}


def with_added_tokens(document: Json, config: Json, special_map: Json) -> dict[str, object]:
    """`tokenizer.json` with the added tokens as Hugging Face has them once all files are read.

    It is `document` itself where the other files say nothing new.
    """
    listed = fields.optional(document, "added_tokens", list, [], "tokenizer")
    model = fields.mapping(document.get("model"), "model")
    known_ids, size = _known_ids(model)
    tokens: dict[str, dict[str, Any]] = {}
    for node in listed:
        entry = fields.mapping(node, "added_tokens")
        tokens[fields.field(entry, "content", str, "added_tokens")] = entry
    before = dict(tokens)
    for described in _decoder(config):
        content: str = described["content"]
        tokens[content] = {**tokens.get(content, {}), **described}
    known = set(tokens)
    for content, flags in _special(_merged_config(config, special_map)):
        own = tokens[content] if content in known else {"content": content, **flags}
        tokens[content] = {**own, "special": True}
    tokens.pop("", None)
    if all(before.get(content) == entry for content, entry in tokens.items()):
        return dict(document)
    taken = [entry["id"] for entry in before.values() if type(entry.get("id")) is int]
    following = max([size - 1, *taken]) + 1
    for content, entry in tokens.items():
        if content in before:
            continue
        id_ = known_ids.get(content)
        if id_ is None:
            id_, following = following, following + 1
        tokens[content] = {**dict.fromkeys(_FLAGS, False), **entry, "id": id_}
    return {**document, "added_tokens": list(tokens.values())}


def _known_ids(model: Json) -> tuple[dict[str, int], int]:
    """The ids of a model's own tokens, and how many it has."""
    vocabulary = model.get("vocab")
    if model.get("type") == "Unigram":
        pieces = listed_pieces(model)
        return {piece: id_ for id_, piece in enumerate(pieces)}, len(pieces)
    known: dict[str, int] = vocabulary if isinstance(vocabulary, dict) else {}
    return known, len(known)


def _decoder(config: Json) -> list[dict[str, Any]]:
    """The entries of `added_tokens_decoder`, in the order of their ids, which decide no more."""
    where = "added_tokens_decoder"
    found = config.get(where) or {}
    entries = []
    if not isinstance(found, dict):
        raise _wrong(where, found, "an object")
    for key, node in found.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise _wrong(f"{where} key", key, "an id")
        entry = node if isinstance(node, dict) else {}
        if not isinstance(entry.get("content"), str):
            raise _wrong(f"{where} entry {key}", node, "a token with its content")
        entries.append((int(key), {"content": entry["content"], **_flags(entry)}))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]


def _special(config: Json) -> list[tuple[str, dict[str, bool]]]:
    """The tokens that are named or listed as special ones, and their flags where they have any."""
    values = [config.get(name) for name in NAMED]
    for key in TOKEN_LISTS:
        listed = config.get(key)
        if isinstance(listed, list):
            values += listed
            break
    found: list[tuple[str, dict[str, bool]]] = []
    for value in values:
        if isinstance(value, str):
            found.append((value, {}))
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            found.append((value["content"], _flags(value)))
        elif value is not None:
            raise _wrong("a special token", value, "a text or a token with its content")
    return found


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise _wrong(f"{name} of a token", value, "true or false")
    return flags


def _wrong(what: str, found: object, expected: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer_config.json: {what} is {str(found)[:80]!r}; expected {expected}; "
        "fetch or export the file again"
    )
