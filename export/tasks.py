"""Multiple-choice tasks: which of the choices does the model find likeliest after the question?

Items, scoring and standard errors are lm-evaluation-harness's (``output_type: multiple_choice``,
https://github.com/EleutherAI/lm-evaluation-harness); a small random sample stands for a large file
as in tinyBenchmarks (https://arxiv.org/abs/2402.14992), with its uncertainty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.runtime.backends import Session

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
            items.append(_item(json.loads(line)))
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
    labels: Sequence[str] = [chr(ord("A") + i) for i in range(len(choices))]
    if isinstance(choices, dict):
        choices, labels = choices["text"], choices["label"]
    answer = _first(data, _ANSWERS)
    if not isinstance(question, str) or not all(isinstance(c, str) for c in choices):
        raise TypeError("question and choices must be texts")
    if isinstance(answer, str) and answer in labels:
        answer = labels.index(answer)
    elif isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    gold = int(answer)
    if not 0 <= gold < len(choices) or len(choices) < 2:
        raise ValueError(f"answer {answer!r} of {len(choices)} choices")
    return Item(question, tuple(choices), gold)


def _first(data: dict[str, Any], names: Sequence[str]) -> Any:
    """The field that goes by one of ``names``; KeyError where there is none."""
    return data[next((name for name in names if name in data), names[0])]


def sample_of(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """``count`` items drawn without replacement, the same for the same seed; None: all."""
    if count is None or count >= len(items):
        return list(items)
    if count < 2:
        raise UsageError(f"a sample of {count} items, expected at least 2")
    chosen = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[i] for i in sorted(chosen)]


def evaluate_task(
    session: Session,
    encode: Callable[[str], list[int]],
    name: str,
    items: Sequence[Item],
    *,
    sample: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResult:
    """Score ``items``, or a random ``sample``; ContextOverflowError where one is too long."""
    chosen = sample_of(items, sample, seed)
    hits = np.zeros((2, len(chosen)))
    for done, item in enumerate(chosen, 1):
        likelihoods = np.array(log_likelihoods(session, encode, item))
        lengths = np.array([len(choice) for choice in item.choices])
        hits[0, done - 1] = likelihoods.argmax() == item.gold
        hits[1, done - 1] = (likelihoods / lengths).argmax() == item.gold
        progress(done, len(chosen))
    (acc, acc_norm), (error, error_norm) = hits.mean(1), [_stderr(row) for row in hits]
    missing = math.sqrt((len(items) - len(chosen)) / max(len(items) - 1, 1))
    return TaskResult(
        task=name,
        items=len(chosen),
        total=len(items),
        acc=float(acc),
        acc_stderr=error,
        acc_ci95=_Z95 * error * missing,
        acc_norm=float(acc_norm),
        acc_norm_stderr=error_norm,
        acc_norm_ci95=_Z95 * error_norm * missing,
    )


def log_likelihoods(
    session: Session, encode: Callable[[str], list[int]], item: Item
) -> list[float]:
    """``log P(choice | question)`` of each choice, in nats; the question is run once."""
    context = item.question.rstrip()
    between = item.question[len(context) :] or _DELIMITER  # spaces belong to what follows
    question = encode(context)
    session.truncate(0)
    first = _log_softmax(session.forward(np.asarray(question))[-1:])
    found = []
    for choice in item.choices:
        tokens = np.asarray(encode(context + between + choice)[len(question) :])
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


def _stderr(hits: Any) -> float:
    """Of the mean, from the sample's standard deviation."""
    return float(hits.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else math.nan
