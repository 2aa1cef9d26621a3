"""Actions that a model may propose and only a person sets off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketslm.runtime import calls
from pocketslm.runtime.model import TextModel
from pocketslm.runtime.tool_formats import Call

# Each action is a JSON schema: what a call must look like. Kinds of slots: text, number, choice.
SCHEMAS: dict[str, dict[str, Any]] = {
    "set_reminder": {
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 80},
            "day": {"type": "string", "enum": ["today", "tomorrow"]},
            "hour": {"type": "integer", "minimum": 0, "maximum": 23},
            "minute": {"type": "integer", "minimum": 0, "maximum": 59},
        },
    },
    "share_text": {
        # A model proposes short texts; a person may send more.
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 400, "longest": 100_000}
        },
    },
}

_EXAMPLES = (
    (
        "Remind me to call Ana at 18:30",
        Call("set_reminder", {"title": "call Ana", "day": "today", "hour": 18, "minute": 30}),
    ),
    (
        "Share with Tom that the train is late",
        Call("share_text", {"text": "The train is late"}),
    ),
    (
        "Remind me tomorrow at 9 to buy milk",
        Call("set_reminder", {"title": "buy milk", "day": "tomorrow", "hour": 9, "minute": 0}),
    ),
    ("Send this: I will be there soon", Call("share_text", {"text": "I will be there soon"})),
)


@dataclass(frozen=True)
class Action:
    """A call: the name of a schema and a value for each of its properties."""

    name: str
    arguments: dict[str, str | int]

    def valid(self) -> bool:
        """Whether it is exactly what its schema allows."""
        schema = SCHEMAS.get(self.name)
        if schema is None or set(self.arguments) != set(schema["properties"]):
            return False
        return not self.faults()

    def faults(self) -> list[str]:
        """The arguments that the schema does not allow."""
        rules = SCHEMAS[self.name]["properties"]
        return [name for name, rule in rules.items() if not _fits(self.arguments.get(name), rule)]


def _fits(value: Any, rule: dict[str, Any]) -> bool:
    if rule["type"] == "integer":
        return type(value) is int and rule["minimum"] <= value <= rule["maximum"]
    if not isinstance(value, str):
        return False
    if "enum" in rule:
        return value in rule["enum"]
    return rule["minLength"] <= len(value) <= rule.get("longest", rule["maxLength"])


def propose(model: TextModel, request: str) -> Action:
    """The action that a model makes of a request; always valid for its schema.

    Raises what :func:`pocketslm.runtime.calls.propose` raises.
    """
    functions = {
        name: {
            "type": "object",
            "properties": {
                key: {word: value for word, value in rule.items() if word != "longest"}
                for key, rule in schema["properties"].items()
            },
            "required": list(schema["properties"]),
            "additionalProperties": False,
        }
        for name, schema in SCHEMAS.items()
    }
    call = calls.propose(model, request, functions, _EXAMPLES)
    action = Action(call.name, call.arguments)
    assert action.valid()
    return action
