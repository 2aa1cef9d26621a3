"""Calls of functions that are always well-formed: a schema holds them, the model only chooses.

Every call is valid, whatever the model. PhoneLM (https://arxiv.org/abs/2411.05046) and DroidCall
(https://arxiv.org/abs/2412.00402) train models for such calls. Here validity needs no training,
though good choices would.
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

CALL_TOKENS = 120  # enough for the longest usual call


def call_schema(functions: Mapping[str, Mapping[str, Any]], arguments: str = "arguments") -> Any:
    """The JSON schema of a call of any of the functions: {"name": ..., "arguments": {...}}.

    - ``functions``: the name of each function, with the JSON schema of its arguments.
    - ``arguments``: the name of the member that holds the arguments.

    Raises UsageError if there are no functions.
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
    """Turn a request into a call. The prompt shows examples of requests with their calls.

    Decoding is greedy and uses no chat template, so that any model will do. Raises UsageError for
    an empty request or an unsupported schema, ContextOverflowError if the call does not fit.
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
