"""Pack a tokenizer.json and a chat template for ``pocketslm-run``, which has no JSON model reader
and no Jinja.

The runner covers byte-level BPE with GPT-2's word pattern, with digits apart or not; for anything
else these functions return a reason instead, and the runner takes token ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocketslm.runtime.tokenizer.pretokenizers import byte_alphabet

VERSION = 1
NO_TOKEN = 2**32 - 1  # a byte that no text of the training data had; it encodes to nothing
Messages = list[dict[str, str]]


def _parts(node: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    return list(node[key]) if node["type"] == "Sequence" else [node]


def _unsupported(tokenizer: Mapping[str, Any]) -> str | None:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "vocab" not in model:
        return "the tokenizer is not a byte-level BPE"
    if model.get("ignore_merges") or model.get("continuing_subword_prefix"):
        return "the tokenizer's BPE has options that the runner lacks"
    if tokenizer.get("normalizer") is not None:
        return "the tokenizer normalizes text"
    words = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if words and words[0]["type"] == "Digits" and words[0].get("individual_digits"):
        words = words[1:]
    if [w["type"] for w in words] != ["ByteLevel"] or words[0].get("add_prefix_space", True):
        return "the pre-tokenizer is not GPT-2's"
    if not words[0].get("use_regex", True):
        return "the pre-tokenizer is not GPT-2's"
    flags = ("lstrip", "rstrip", "single_word")
    if any(token.get(flag) for token in tokenizer["added_tokens"] for flag in flags):
        return "an added token strips its surroundings"
    return None


def pack_tokenizer(text: str | bytes) -> tuple[bytes | None, str]:
    """The packed section, or None and the reason."""
    tokenizer = json.loads(text)
    try:
        reason = _unsupported(tokenizer)
    except (KeyError, TypeError) as error:
        reason = f"tokenizer.json has an unknown form ({error!r})"
    if reason is not None:
        return None, reason
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    alphabet = {chr(code): byte for byte, code in byte_alphabet().items()}
    count = 1 + max([*vocabulary.values(), *added])
    pieces = [b""] * count
    for piece, index in vocabulary.items():
        if index not in added:
            if not all(c in alphabet for c in piece):
                return None, f"token {piece!r} is not written in the byte alphabet"
            pieces[index] = bytes(alphabet[c] for c in piece)
    for index, content in added.items():
        pieces[index] = content.encode()
    merges: list[int] = []
    for merge in tokenizer["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges += vocabulary[left], vocabulary[right], vocabulary[left + right]
    offsets = [0]
    for packed in pieces:
        offsets.append(offsets[-1] + len(packed))
    by_byte = [vocabulary.get(chr(byte_alphabet()[b]), NO_TOKEN) for b in range(256)]
    words = [*offsets, *merges, *added, *by_byte]
    digits = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")[0]["type"] == "Digits"
    header = (VERSION, count, len(merges) // 3, len(added), int(digits), offsets[-1])
    return struct.pack(f"<6I{len(words)}I", *header, *words) + b"".join(pieces), ""


def chat_parts(
    render: Callable[[Messages, bool], str], eos: Sequence[int]
) -> tuple[dict[str, Any] | None, str]:
    """The strings of a template around alternating messages, or None and the reason.

    ``render(messages, add_generation_prompt)`` is the template. It is taken apart with marks for
    contents and put to the test on longer conversations.
    """
    marks = {"system": "<<system>>", "user": "<<user>>", "assistant": "<<assistant>>"}

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": marks[role]}

    def between(text: str, left: str, right: str) -> str:
        start = text.index(left) + len(left) if left else 0
        return text[start : text.index(right, start) if right else len(text)]

    system, user, assistant = (message(role) for role in marks)
    try:
        asked = render([user], True)
        with_system = render([system, user], True)
        continued = render([user, assistant, user], True)
        tail = continued[continued.index(marks["assistant"]) + len(marks["assistant"]) :]
        parts = {
            "start_system": between(with_system, "", marks["system"]),
            "system_to_user": between(with_system, marks["system"], marks["user"]),
            "start_user": between(asked, "", marks["user"]),
            "user_to_assistant": between(asked, marks["user"], ""),
            "assistant_to_user": between(tail, "", marks["user"]),
        }
        for start in ([user], [system, user]):
            conversation = [*start, assistant, user, assistant, user]
            if render(conversation, True) != _join(conversation, parts):
                return None, "the chat template depends on more than the roles' order"
    except Exception as error:  # a template may raise what it likes
        return None, f"the chat template could not be taken apart ({error!r})"
    return {**parts, "eos": list(eos)}, ""


def _join(messages: Messages, parts: Mapping[str, str]) -> str:
    text, previous = "", "start"
    for message in messages:
        text += (
            parts[f"{previous}_to_{message['role']}"]
            if previous != "start"
            else (parts[f"start_{message['role']}"])
        )
        text += message["content"]
        previous = message["role"]
    return text + parts["user_to_assistant"]
