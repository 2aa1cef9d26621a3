"""Multiple-choice tasks: which of the choices does the model find likeliest after the question?

Items, scoring and standard errors are lm-evaluation-harness's (``output_type: multiple_choice``,
https://github.com/EleutherAI/lm-evaluation-harness); a small sample stands for a large file, with
its uncertainty. tinyBenchmarks (https://arxiv.org/abs/2402.14992) chooses such items by item
response theory, fitted to the answers of hundreds of models. With the few runs at hand that cannot
be fitted; their part here is to say which items are about equally hard. The sample is drawn evenly
over them, at random, so that its interval holds however well the earlier runs foretell the next.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm import schema
from pocketslm.errors import UsageError
from pocketslm.runtime.backends import ForgettingSession, SavingSession, Session

Ids = npt.NDArray[np.int64]
Margins = Sequence[float]  # of every item, in nats

_DELIMITER = " "  # the harness's target_delimiter
_QUESTIONS, _ANSWERS = ("query", "question", "ctx"), ("gold", "answer", "answerKey", "label")
_Z95 = 1.959964


@dataclass(frozen=True)
class Item:
    question: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskResult:
    """``acc``: share of items whose likeliest choice is right; ``acc_norm``: likeliest a character.

    ``*_stderr``: of the task as such (items are a sample of all possible ones), as the harness
    says it. ``*_ci95``: half the width of the 95 % interval for the whole file of ``total`` items;
    0 where all of them were scored.
    """

    task: str
    items: int
    total: int
    acc: float
    acc_stderr: float
    acc_ci95: float
    acc_norm: float
    acc_norm_stderr: float
    acc_norm_ci95: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_items(path: Path) -> list[Item]:
    """One item a line: a question (query, question or ctx), choices, and which is right.

    ``choices`` is a list, or ARC's object with ``text`` and ``label``; the answer (gold, answer,
    answerKey or label) is an index, a label, or one of the choices. Raises UsageError with the line
    that is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as JSON lines: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(schema.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{path} line {number} is no multiple-choice item ({reason}); expected "
                '{"query": "...", "choices": ["...", "..."], "gold": 0}'
            ) from None
    if not items:
        raise UsageError(f"{path} has no items")
    return items


def _item(data: dict[str, Any]) -> Item:
    question = _first(data, _QUESTIONS)
    choices = data["choices"]
    labels = [chr(ord("A") + i) for i in range(len(choices))]
    if isinstance(choices, dict):
        choices, labels = choices["text"], choices["label"]
    answer = _first(data, _ANSWERS)
    if not isinstance(choices, list) or not isinstance(labels, list):
        raise TypeError("choices must be a list")
    if any(not isinstance(text, str) or not text.strip() for text in (question, *choices)):
        raise TypeError("question and choices must be texts that say something")
    if isinstance(answer, str) and answer in labels:
        answer = labels.index(answer)
    elif isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool | float):
        raise TypeError(f"answer is {answer!r}")
    gold = int(answer)
    if not 0 <= gold < len(choices) or len(choices) < 2:
        raise ValueError(f"answer {answer!r} of {len(choices)} choices")
    return Item(question, tuple(choices), gold)


def _first(data: dict[str, Any], names: Sequence[str]) -> Any:
    """The field that goes by one of ``names``; KeyError where there is none."""
    return data[next((name for name in names if name in data), names[0])]


@dataclass(frozen=True)
class Stratum:
    """Items that are alike, by index, and how many of them are to be drawn."""

    items: Ids
    draws: int


def strata_of(total: int, sample: int | None, earlier: Sequence[Margins] = ()) -> list[Stratum]:
    """How ``sample`` of ``total`` items are to be drawn; None: all are.

    Without ``earlier`` runs, from all alike. With them, two from each of sample / 2 strata: items
    that were about as hard, by the mean of their margins. Raises UsageError for a sample below 2.
    """
    count = total if sample is None else min(sample, total)
    if count < min(2, total):
        raise UsageError(f"a sample of {count} items, expected at least 2")
    if not earlier:
        return [Stratum(np.arange(total), count)]
    order = np.argsort(np.mean(earlier, 0), kind="stable")
    parts = np.array_split(order, max(count // 2, 1))  # the first ones are larger
    return [
        Stratum(part, count - 2 * (len(parts) - 1) if first == 0 else 2)
        for first, part in enumerate(parts)
    ]


def estimate(strata: Sequence[Stratum], hits: Sequence[Any]) -> tuple[float, float, float]:
    """The mean over all items from the ``hits`` [draws] of each stratum, with two uncertainties.

    They are the standard error for the task as such, and half of the 95 % interval for the items
    at hand: the mean over strata weighted by their sizes, exact where all items were drawn.
    """
    total = sum(len(stratum.items) for stratum in strata)
    mean = variance = 0.0
    for stratum, found in zip(strata, hits, strict=True):
        size, draws = len(stratum.items), stratum.draws
        mean += size / total * float(found.mean())
        if size > draws:
            spread = float(found.var(ddof=1)) / draws
            variance += (size / total) ** 2 * (1 - draws / size) * spread
    beyond = mean * (1 - mean) / (total - 1) if total > 1 else math.nan
    return mean, math.sqrt(variance + beyond), _Z95 * math.sqrt(variance)


def evaluate_task(
    session: Session,
    encode: Callable[[str], list[int]],
    name: str,
    items: Sequence[Item],
    *,
    sample: int | None = None,
    seed: int = 0,
    earlier: Sequence[Margins] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskResult, list[float]]:
    """Score ``items``, or a ``sample`` drawn by :func:`strata_of`; the result and their margins.

    A margin is how many nats the right choice is ahead of the next. Raises ContextOverflowError
    where an item is too long.
    """
    strata = strata_of(len(items), sample, earlier)
    draw = np.random.default_rng(seed)
    total = sum(stratum.draws for stratum in strata)
    plain, norm, margins = [], [], list[float]()
    for stratum in strata:
        chosen = np.sort(draw.choice(stratum.items, stratum.draws, replace=False))
        hits = np.zeros((2, len(chosen)))
        for place, item in enumerate(items[index] for index in chosen):
            likelihoods = np.array(log_likelihoods(session, encode, item))
            lengths = np.array([len(choice) for choice in item.choices])
            hits[0, place] = likelihoods.argmax() == item.gold
            hits[1, place] = (likelihoods / lengths).argmax() == item.gold
            others = np.delete(likelihoods, item.gold)
            margins.append(float(likelihoods[item.gold] - others.max()))
            progress(len(margins), total)
        plain.append(hits[0])
        norm.append(hits[1])
    acc, acc_norm = estimate(strata, plain), estimate(strata, norm)
    return TaskResult(name, total, len(items), *acc, *acc_norm), margins


def save_margins(path: Path, items: Sequence[Item], margins: Sequence[float]) -> None:
    """Append the margins of a run over all ``items`` to ``path``, for :func:`read_margins`."""
    line = json.dumps({"items": _sha256(items), "margins": list(margins)})
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None


def read_margins(path: Path, items: Sequence[Item]) -> list[Margins]:
    """The margins of each run over ``items`` in a file of :func:`save_margins`.

    Raises UsageError where it cannot be read or has no run over the same items.
    """
    try:
        runs = [schema.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [run["margins"] for run in runs if run["items"] == _sha256(items)]
        whole = all(len(run) == len(items) and math.isfinite(sum(run)) for run in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read {path} as runs of `eval --save`: {reason}") from None
    if not found or not whole:
        raise UsageError(f"{path} has no whole run over these items; make one with --save")
    return found


def _sha256(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()


def log_likelihoods(
    session: Session, encode: Callable[[str], list[int]], item: Item
) -> list[float]:
    """``log P(choice | question)`` of each choice, in nats; the question is run once."""
    context = item.question.rstrip()
    between = item.question[len(context) :] or _DELIMITER  # spaces belong to what follows
    question = encode(context)
    session.truncate(0)
    first = _log_softmax(session.forward(np.asarray(question))[-1:])
    # A state with windows or convolutions cannot always be cut back.
    forgets = isinstance(session, ForgettingSession) and session.rewind_limit > 1
    saved = session.save() if forgets and isinstance(session, SavingSession) else None
    found = []
    for choice in item.choices:
        tokens = np.asarray(encode(context + between + choice)[len(question) :])
        if isinstance(session, SavingSession) and saved is not None:
            session.restore(len(question), saved)
        elif forgets:
            session.truncate(0)
            session.forward(np.asarray(question))
        else:
            session.truncate(len(question))
        rows = first
        if len(tokens) > 1:
            rest = _log_softmax(session.forward(tokens[:-1], all_logits=True))
            rows = np.concatenate([first, rest])
        found.append(float(rows[np.arange(len(tokens)), tokens].sum()))
    return found


def _log_softmax(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
