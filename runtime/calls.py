"""A call of a function that cannot be malformed: the schema holds it, the model only chooses.

So every call is valid, whatever the model is (PhoneLM, https://arxiv.org/abs/2411.05046, and
DroidCall, https://arxiv.org/abs/2412.00402, train models for calls like these; validity here needs
no training, good choices would).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.tool_formats import Call

if TYPE_CHECKING:
    from pocketslm.runtime.model import TextModel

CALL_TOKENS = 120  # that the longest usual call takes


def call_schema(functions: Mapping[str, Mapping[str, Any]], arguments: str = "arguments") -> Any:
    """The JSON schema of a call of any of the functions: {"name": ..., "arguments": {...}}.

    functions: the JSON schema of its arguments by each one's name. arguments: how the member is
    called. Raises UsageError for none.
    """
    if not functions:
        raise UsageError("there is no function to call")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, arguments: dict(parameters)},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for name, parameters in functions.items()
    ]
    return {"anyOf": calls} if len(calls) > 1 else calls[0]


def propose(
    model: TextModel,
    request: str,
    functions: Mapping[str, Mapping[str, Any]],
    examples: Sequence[tuple[str, Call]] = (),
) -> Call:
    """The call that a model makes of a request, after examples of requests with theirs.

    It is greedy, for any model: without a chat template. Raises UsageError for an empty request or
    schemas that are not supported, ContextOverflowError where the call does not fit.
    """
    request = " ".join(request.split())
    if not request:
        raise UsageError("there is nothing to do; write what, for example a reminder")
    config = GenerationConfig(json_schema=call_schema(functions))
    records = list(model.generate(_prompt(model, request, examples), config))
    if records[-1].finish in ("length", "context"):
        raise ContextOverflowError(f"the call does not fit the context of {model.context}")
    call = json.loads("".join(record.text for record in records))
    return Call(call["name"], call["arguments"])


def _prompt(model: TextModel, request: str, examples: Sequence[tuple[str, Call]]) -> list[int]:
    """The request after as many examples as leave room for the call."""
    lines = [f"{asked} ->\n{written(call)}\n" for asked, call in examples]
    while True:
        ids = model.tokenizer.encode(f"{''.join(lines)}{request} ->\n")
        if not lines or len(ids) + CALL_TOKENS <= model.context:
            return ids
        lines.pop(0)


def written(call: Call) -> str:
    """The call as JSON, as its schema has it."""
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
