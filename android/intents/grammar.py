"""A tool call that cannot be malformed: the grammar writes it, the model only chooses.

The schema's names, braces and quotes are written for the model. It chooses the function and every
choice by which continuation it finds more probable, digits among those that keep a number within
its range, and free text until the closing quote. So every call is valid, whatever the model is
(PhoneLM, https://arxiv.org/abs/2411.05046, and DroidCall, https://arxiv.org/abs/2412.00402, train
models for calls like these; validity here needs no training, good choices would).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketslm.android.intents import SCHEMAS, Action
from pocketslm.errors import BackendError, UsageError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, TextModel
from pocketslm.runtime.sampling import log_sum_exp

CALL_TOKENS = 120  # that the longest usual call takes

_EXAMPLES = """\
Remind me to call Ana at 18:30 -> {"name": "set_reminder", "title": "call Ana", "day": "today", \
"hour": 18, "minute": 30}
Share with Tom that the train is late -> {"name": "share_text", "text": "The train is late"}
Remind me tomorrow at 9 to buy milk -> {"name": "set_reminder", "title": "buy milk", \
"day": "tomorrow", "hour": 9, "minute": 0}
Send this: I will be there soon -> {"name": "share_text", "text": "I will be there soon"}
"""


def propose(model: TextModel, request: str) -> Action:
    """The call that a model makes of a request; always valid for its schema.

    Raises UsageError for an empty request, BackendError for an engine that gives no
    probabilities.
    """
    request = " ".join(request.split())
    if not request:
        raise UsageError("there is nothing to do; write what, for example a reminder")
    inner = getattr(model, "model", model)
    if not isinstance(inner, Model):
        raise BackendError("this engine gives no probabilities; choose another in the settings")
    writer = _Writer(inner, _prompt(inner, request))
    names = list(SCHEMAS)
    name = names[writer.choose([f'"name": "{name}"' for name in names])]
    arguments: dict[str, str | int] = {}
    for key, rule in SCHEMAS[name]["properties"].items():
        writer.write(f', "{key}": ')
        arguments[key] = _value(writer, rule, request)
    action = Action(name, arguments)
    assert action.valid()
    return action


def _prompt(model: Model, request: str) -> str:
    """The request after as many examples as leave room for the call."""
    examples = _EXAMPLES.splitlines(keepends=True)
    while True:
        text = f"{''.join(examples)}{request} -> {{"
        if not examples or len(model.tokenizer.encode(text)) + CALL_TOKENS <= model.context:
            return text
        examples.pop(0)


def _value(writer: _Writer, rule: dict[str, Any], request: str) -> str | int:
    if rule["type"] == "integer":
        return writer.number(rule["minimum"], rule["maximum"])
    if "enum" in rule:
        chosen = writer.choose([json.dumps(value) for value in rule["enum"]])
        return str(rule["enum"][chosen])
    writer.write('"')
    text = writer.text(rule["maxLength"])
    writer.write('"')
    return text or request[: rule["maxLength"]]


class _Writer:
    """A text that grows by what is written and what the model chooses."""

    def __init__(self, model: Model, text: str) -> None:
        self._model = model
        self._text = text

    def write(self, text: str) -> None:
        self._text += text

    def choose(self, options: Sequence[str]) -> int:
        """The option that the model finds most probable; it is written."""
        scores = [self._score(option) for option in options]
        best = int(np.argmax(scores))
        self.write(options[best])
        return best

    def number(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, digit by digit."""
        written = ""
        while True:
            candidates = {
                str(value)[: len(written) + 1]
                for value in range(low, high + 1)
                if str(value).startswith(written) and len(str(value)) > len(written)
            }
            digits = sorted({candidate[-1] for candidate in candidates})
            ends = written != "" and low <= int(written) <= high
            options = digits + ([","] if ends else [])
            if not digits:
                break
            logits = self._logits(self._ids(self._text))
            scores = [float(logits[self._first_id(option)]) for option in options]
            choice = options[int(np.argmax(scores))]
            if choice == ",":
                break
            written += choice
            self.write(choice)
        return int(written)

    def text(self, longest: int) -> str:
        """Text up to a closing quote, on one line."""
        config = GenerationConfig(max_new_tokens=32, stop_strings=('"', "\n", "}"))
        made = "".join(
            record.text for record in self._model.generate(self._ids(self._text), config)
        )
        made = " ".join(made.replace("\\", " ").split())[:longest].strip()
        self.write(made)
        return made

    def _score(self, option: str) -> float:
        """Log-probability of the option after the text."""
        before = self._ids(self._text)
        whole = self._ids(self._text + option)
        common = 0
        while common < len(before) and before[common] == whole[common]:
            common += 1
        total = 0.0
        for at in range(common, len(whole)):
            logits = self._logits(whole[:at])
            total += float(logits[whole[at]]) - log_sum_exp(logits)
        return total

    def _logits(self, ids: list[int]) -> Any:
        return self._model.engine.logits(ids)

    def _ids(self, text: str) -> list[int]:
        return self._model.tokenizer.encode(text)

    def _first_id(self, text: str) -> int:
        return self._model.tokenizer.encode(text)[0]
