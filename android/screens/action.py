"""An action that a model proposed or a person asked for: seen, changed and confirmed first."""

from __future__ import annotations

from typing import Any

from kivy.app import App
from kivy.factory import Factory

from pocketslm.android.intents import SCHEMAS, Action
from pocketslm.android.widgets.sheet import Sheet


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
    return f"{t(action.name)}: {', '.join(values)}"


def ask_before(action: Action) -> None:
    """Show an action with its values to change; it happens only when it is confirmed."""
    app = App.get_running_app()
    sheet = Sheet()
    sheet.add(Factory.Caption(content=app.t("action_title")))
    sheet.add(Factory.Heading(content=app.t(action.name)))
    fields: dict[str, Any] = {}
    for key, value in action.arguments.items():
        name = app.t(f"field_{key}")
        sheet.add(Factory.Caption(content=name))
        shown = app.t(value) if value in ("today", "tomorrow") else str(value)
        long = key == "text"
        fields[key] = sheet.add(Factory.Field(text=shown, label=name, multiline=long))

    def confirmed() -> None:
        changed = Action(action.name, {key: _read(key, fields[key].text, action) for key in fields})
        done = changed if changed.valid() else action
        app.phone.do(done)
        app.notice(app.t("done" if app.phone.is_phone else "would_do", action=describe(done)))

    sheet.buttons((app.t("cancel"), "plain", lambda: None), (app.t("confirm"), "filled", confirmed))
    sheet.open()


def _read(key: str, text: str, action: Action) -> str | int:
    rule = SCHEMAS[action.name]["properties"][key]
    if rule["type"] == "integer":
        return int(text) if text.strip().isdigit() else action.arguments[key]
    if "enum" in rule:
        t = App.get_running_app().t
        return next((value for value in rule["enum"] if text.strip() in (value, t(value))), text)
    return text.strip()
