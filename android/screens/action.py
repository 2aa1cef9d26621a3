"""An action that a model proposed or a person asked for: seen, changed and confirmed first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kivy.app import App
from kivy.factory import Factory
from kivy.metrics import dp

from pocketslm.android.intents import SCHEMAS, Action
from pocketslm.android.widgets.sheet import Sheet

SHOWN = 120  # characters of an action that a line says


def describe(action: Action) -> str:
    """One line for people."""
    t = App.get_running_app().t
    values = [
        t(str(value)) if value in ("today", "tomorrow") else str(value)
        for key, value in action.arguments.items()
        if key not in ("hour", "minute")
    ]
    if "hour" in action.arguments:
        values.append(f"{action.arguments['hour']}:{int(action.arguments['minute']):02d}")
    text = f"{t(action.name)}: {', '.join(values)}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def ask_before(action: Action) -> None:
    """Show an action with its values to change; it happens only when it is confirmed."""
    app = App.get_running_app()
    sheet = Sheet()
    sheet.add(Factory.Caption(content=app.t("action_title")))
    sheet.add(Factory.Heading(content=app.t(action.name)))
    fields: dict[str, Callable[[], str]] = {}
    for key, value in action.arguments.items():
        name = app.t(f"field_{key}")
        sheet.add(Factory.Caption(content=name))
        rule = SCHEMAS[action.name]["properties"][key]
        if "enum" in rule:
            fields[key] = _chooser(sheet, rule["enum"], str(value))
        else:
            field = sheet.add(Factory.Field(text=str(value), label=name, multiline=key == "text"))
            fields[key] = partial(getattr, field, "text")

    fault = sheet.add(Factory.Caption(content="", color=app.theme.danger))

    def confirmed() -> bool:
        """What the sheet says happens, or it stays open and says what cannot be."""
        rules = SCHEMAS[action.name]["properties"]
        changed = Action(action.name, {key: _read(fields[key](), rules[key]) for key in fields})
        if faults := changed.faults():
            fault.content = app.t("wrong_field", field=app.t(f"field_{faults[0]}"))
            return False
        app.phone.do(changed)
        app.notice(app.t("done" if app.phone.is_phone else "would_do", action=describe(changed)))
        return True

    sheet.buttons((app.t("cancel"), "plain", lambda: None), (app.t("confirm"), "filled", confirmed))
    sheet.open()


def _chooser(sheet: Sheet, values: Sequence[str], chosen: str) -> Callable[[], str]:
    """Buttons of which one is marked; returns what says which."""
    t = App.get_running_app().t
    flow = sheet.add(Factory.Flow(spacing=dp(8)))
    chips = {value: Factory.Chip(text=t(value), marked=value == chosen) for value in values}

    def choose(value: str) -> None:
        for other, chip in chips.items():
            chip.marked = other == value

    for value, chip in chips.items():
        chip.bind(on_release=lambda _, value=value: choose(value))
        flow.add_widget(chip)
    return lambda: next((value for value, chip in chips.items() if chip.marked), "")


def _read(text: str, rule: dict[str, Any]) -> str | int:
    """What was typed as the schema wants it; what cannot be stays text, which it refuses."""
    text = text.strip()
    return int(text) if rule["type"] == "integer" and text.isdecimal() else text
