"""How each family of models writes tool calls, and how such texts are read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pocketslm.errors import UsageError


@dataclass(frozen=True)
class Call:
    """The name of a function, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How one family writes tool calls.

    - ``marks``: texts that only a chat template with this format has.
    - ``begin``, ``end``: what stands around a call, or around a list of calls. ``begin`` is empty
      if a call is the whole answer.
    - ``style``: how a call is written.
    - ``arguments``: in a call in JSON, the member that holds the arguments.
    - ``listed``: calls stand in a list.
    """

    name: str
    marks: tuple[str, ...]
    begin: str
    end: str
    style: Literal["json", "python", "gemma"] = "json"
    arguments: str = "arguments"
    listed: bool = False


# The first format whose marks a template has is the template's.
FORMATS = (
    ToolFormat(
        "LFM2", ("<|tool_call_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", "python"
    ),
    ToolFormat(
        "FunctionGemma",
        ("<start_function_call>",),
        "<start_function_call>",
        "<end_function_call>",
        "gemma",
    ),
    ToolFormat("Granite 3", ("<|tool_call|>",), "<|tool_call|>", "", listed=True),
    ToolFormat("Hermes, Qwen, SmolLM3, Granite 4", ("<tool_call>",), "<tool_call>", "</tool_call>"),
    ToolFormat("Llama 3", ("ipython", '"parameters"'), "", "", arguments="parameters"),
)


def format_of(template: str | None) -> ToolFormat:
    """The format of a chat template. Raises UsageError if it is not known."""
    for one in FORMATS if template and "tools" in template else ():
        if all(mark in (template or "") for mark in one.marks):
            return one
    known = "; ".join(one.name for one in FORMATS)
    raise UsageError(
        f"the model's chat template has no calls of tools in a known form ({known}); take a model "
        "that has, or hold the answer to a JSON schema"
    )


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The name of each tool, with the schema of its parameters.

    tools: as in transformers and in OpenAI's interface, {"type": "function", "function": {"name",
    "description", "parameters"}}, or the inner object alone. Raises UsageError.
    """
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
            raise UsageError(
                f"a tool's name is {name!r}, expected letters, digits, '_', '.' or '-'"
            )
        if parameters is not None and not isinstance(parameters, Mapping):
            raise UsageError(f"the parameters of {name} are no JSON schema")
        if name in found:
            raise UsageError(f"two tools have the name {name}")
        found[name] = dict(parameters or {"type": "object", "properties": {}})
        found[name].setdefault("additionalProperties", False)
    if not found:
        raise UsageError("there are no tools to choose from")
    return found


def python_grammar(functions: Mapping[str, Mapping[str, Any]]) -> str:
    """A grammar in GBNF for a list of calls of these functions, with their parameters' names."""
    calls = []
    for name, schema in functions.items():
        names = (json.dumps(f"{key}=", ensure_ascii=False) for key in schema.get("properties", {}))
        keys = " | ".join(names)
        inside = f' (({keys}) value (", " ({keys}) value)*)?' if keys else ""
        calls.append(f'{json.dumps(name + "(")}{inside} ")"')
    return (
        f'root ::= "[" call (", " call)* "]"\ncall ::= {" | ".join(calls)}\n'
        'value ::= text | number | "True" | "False" | "None" | list | table\n'
        'text ::= "\\"" ([^"\\\\\\n] | "\\\\" ["\\\\n])* "\\""\n'
        'number ::= "-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,14})?\n'
        'list ::= "[" (value (", " value)*)? "]"\n'
        'table ::= "{" (text ": " value (", " text ": " value)*)? "}"\n'
    )


def read_calls(form: ToolFormat, text: str) -> list[Call]:
    """Read the calls in a text that stood between ``begin`` and ``end``. Raises UsageError if there
    is none.
    """
    readers: dict[str, Callable[[str, ToolFormat], list[Call]]] = {
        "json": _read_json,
        "python": _read_python,
        "gemma": _read_gemma,
    }
    try:
        return readers[form.style](text.strip(), form)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError):
        raise UsageError(f"the model wrote no call that can be read: {text[:200]!r}") from None


def _read_json(text: str, form: ToolFormat) -> list[Call]:
    value = json.loads(text)
    calls = value if isinstance(value, list) else [value]
    out = [Call(call["name"], call[form.arguments]) for call in calls]
    if not all(isinstance(c.name, str) and isinstance(c.arguments, dict) for c in out):
        raise ValueError
    return out


def _read_python(text: str, form: ToolFormat) -> list[Call]:
    """Names of functions and parameters may be none of Python's own, such as ``from``."""
    calls = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    out = []
    for call in _members(calls):
        name, _, inside = call.partition("(")
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or not inside.endswith(")"):
            raise ValueError
        arguments: dict[str, Any] = {}
        for member in _members(inside[:-1]):
            key, equals, value = member.partition("=")
            if not equals or key in arguments:
                raise ValueError
            arguments[key] = ast.literal_eval(value)
        out.append(Call(name, arguments))
    if not out:
        raise ValueError
    return out


_SIGNS = re.compile(r"""["](?:[^"\\]|\\.)*["]|['](?:[^'\\]|\\.)*[']|[](){}[,]""", re.DOTALL)


def _members(text: str) -> list[str]:
    """What stands between the commas that are in no text and no brackets."""
    depth, start, parts = 0, 0, []
    for sign in _SIGNS.finditer(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign.group(), 0)
        if sign.group() == "," and depth == 0:
            parts.append(text[start : sign.start()].strip())
            start = sign.end()
    last = text[start:].strip()
    return [*parts, last] if parts or last else []


_GEMMA = re.compile(r"call:([\w.-]+)\{")


def _read_gemma(text: str, form: ToolFormat) -> list[Call]:
    match = _GEMMA.match(text)
    if match is None:
        raise ValueError
    # Turn it into JSON: strings stand between <escape>, and members have no quotes.
    parts = text[match.end() - 1 :].split("<escape>")
    for at in range(0, len(parts), 2):
        parts[at] = re.sub(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:", r'\1"\2":', parts[at])
    for at in range(1, len(parts), 2):
        parts[at] = json.dumps(parts[at])
    arguments = json.loads("".join(parts))
    if not isinstance(arguments, dict):
        raise ValueError
    return [Call(match[1], arguments)]
