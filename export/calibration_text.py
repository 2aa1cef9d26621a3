"""Which tokens show a model's layers what they will read."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from pocketslm.errors import TokenizerError, UsageError
from pocketslm.export.text import read_text
from pocketslm.models.catalog import resolve
from pocketslm.runtime.bundle import file_entry
from pocketslm.runtime.tokenizer import Tokenizer

MIX = "mix"
# Of the catalog, the short ones first: the others make good what they lack.
_CHATS, _TEXTS = ("trivia", "coding"), ("wiki", "lee")
_DAY = datetime.date(2026, 1, 1)  # of every chat, so that the same files come out tomorrow


def calibration_windows(
    text: str,
    tokenizer: Tokenizer,
    tokens: int,
    window: int,
    say: Callable[[str], None] = lambda message: None,
) -> Tensor:
    """The last ``tokens`` tokens of a text as int64 windows [tokens / window, window].

    ``text``: a file, a catalog name, or ``mix``: as many windows each of trivia and of coding, as
    chats in the model's template, of Wikipedia and of news. ``say`` tells what is downloaded.
    Raises UsageError where a text cannot be read or has too few tokens.
    """
    if text != MIX:
        return last_tokens(resolve(text, say), tokenizer.encode, tokens, window)
    missing = tokens // window
    if missing < 1:
        raise UsageError(f"the mix has windows of {window} tokens, expected more than {tokens}")
    parts = []
    for others, name in zip((3, 2, 1, 0), _CHATS + _TEXTS, strict=True):
        share, path = -(-missing // (1 + others)), resolve(name, say)
        if name in _CHATS:
            ids = torch.tensor(_chats(path, tokenizer), dtype=torch.int64)
            share = min(share, len(ids) // window)
            parts.append(ids[len(ids) - share * window :].view(share, window))
        elif share:
            parts.append(last_tokens(path, tokenizer.encode, share * window, window))
        missing -= share
    # In turns, since some look at the first windows alone.
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def calibration_sha256(text: str) -> str:
    """Of the file; for the mix, of the hexadecimal digests of its files."""
    if text != MIX:
        return file_entry(resolve(text)).sha256
    digests = "".join(file_entry(resolve(name)).sha256 for name in _CHATS + _TEXTS)
    return hashlib.sha256(digests.encode()).hexdigest()


def last_tokens(text: Path, encode: Callable[[str], list[int]], tokens: int, window: int) -> Tensor:
    """The last ``tokens`` tokens of a text as int64 windows [tokens / window, window].

    The last, because evaluation takes the first: the two stay disjoint in a text that is long
    enough. Raises UsageError where the text cannot be read or has too few.
    """
    content = read_text(text)
    # Tokens are seldom longer than eight characters; the rest need not be tokenized.
    ids = encode(content[-8 * tokens :])
    count = tokens // window
    if count < 1 or len(ids) < count * window:
        raise UsageError(f"{text} has {len(ids)} tokens for calibration, expected {tokens}")
    return torch.from_numpy(np.asarray(ids[-count * window :], np.int64)).view(count, window)


def _chats(path: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids of the conversations in a file of ChatterBot's corpus, as the model's template has
    them; without one that takes a question and an answer, a line for each turn."""
    ids: list[int] = []
    for turns in yaml.safe_load(read_text(path))["conversations"]:
        if not isinstance(turns, list):  # one question there stands without an answer
            continue
        messages = [
            {"role": "assistant" if at % 2 else "user", "content": str(turn)}
            for at, turn in enumerate(turns)
        ]
        try:
            chat = tokenizer.render_chat(messages, False, strftime_now=_DAY.strftime)
        except TokenizerError:
            chat = "".join(f"{turn}\n" for turn in turns)
        ids += tokenizer.encode(chat, parse_special=True)
    return ids
