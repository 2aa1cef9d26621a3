"""A chat template for ``pocketslm-run``, which has no Jinja.

Most templates put texts between messages and look no further into them. Such a template is taken
apart into these texts, with the white space that it trims off messages and the dates that it
writes, and is then put to the test: conversations of every shape that the runner takes, with
messages that hold whatever the template itself mentions, have to come out as from the template.
For any other template `chat_parts` returns a reason instead, and the runner has no chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import Tokenizer

Messages = list[dict[str, str]]
Parts = dict[str, Any]

# As in runtime/ops/runner/chat.cpp.
_DATE_START, _DATE_END = "\x01", "\x02"
_DATE = re.compile(f"{_DATE_START}(.*?){_DATE_END}", re.DOTALL)
# What strftime means the same by in every C library and in Python; no time zones.
_FORM = re.compile(r"(?:[^%]|%[aAbBcCdDeFhHIjmMnprRStTuUVwWxXyY%]){1,100}")
_DAYS = (datetime(2031, 5, 7, 13, 4, 9), datetime(1999, 12, 31, 0, 30, 0))

_PAD = "\v"  # white space that no template writes
_LITERALS = 100  # of a template, that messages are made of
_CONTENTS = (
    "x",
    "",
    " \t\n x \n",
    "\u00a0\u3000x\x1f\x85",
    "A <b>&\"q\" 'é' \\n {{ x }} %s 😀",
    "<think>\na\n</think>\n\nb",
    '{"name": "f", "arguments": {}}',
    "12",
)


class _Unsupported(Exception):
    """Why a template cannot be taken apart."""


def chat_parts(tokenizer: Tokenizer) -> tuple[Parts, str]:
    """The chat section of a model file, and why it has no chat ("" where it has one).

    In any case it has `eos`, the ids that end an answer.
    """
    eos = {"eos": list(tokenizer.identity.eos)}
    if tokenizer.chat_template is None:
        return eos, "it has no chat template"
    try:
        parts = _taken_apart(tokenizer)
        _test(tokenizer, parts)
    except _Unsupported as reason:
        return eos, str(reason)
    except TokenizerError as error:
        return eos, f"the chat template could not be taken apart ({error})"
    return parts | eos, ""


def _taken_apart(tokenizer: Tokenizer) -> Parts:
    marks = {role: f"<<{role}>>" for role in ("system", "user", "assistant")}
    system, user, assistant = ({"role": r, "content": mark} for r, mark in marks.items())

    def between(text: str, left: str, right: str) -> tuple[str, str]:
        """What stands between two marks (or the text's start, or its end), and what follows."""
        _, found, rest = text.partition(left) if left else ("", "", text)
        middle, last, after = rest.partition(right) if right else (rest, "", "")
        if found != left or last != right:
            raise _Unsupported("the chat template does not write each message once")
        return middle, last + after

    asked = _render(tokenizer, [user])
    _, answered = between(_render(tokenizer, [user, assistant, user]), "", marks["assistant"])
    parts: Parts = {
        "start_user": between(asked, "", marks["user"])[0],
        "user_to_assistant": between(asked, marks["user"], "")[0],
        "assistant_to_user": between(answered, marks["assistant"], marks["user"])[0],
    }
    try:
        whole = _render(tokenizer, [system, user])
        first, rest = between(whole, "", marks["system"])
        second, _ = between(rest, marks["system"], marks["user"])
        parts |= {"start_system": first, "system_to_user": second}
    except (TokenizerError, _Unsupported):
        pass  # a template that takes no system message
    starts = [[user], [system, user]] if "start_system" in parts else [[user]]
    trimmed: tuple[set[str], set[str]] = set(), set()
    for start in starts:
        _find_trimmed(tokenizer, [*start, assistant, user], parts, trimmed)
    return parts | {"trim_left": sorted(trimmed[0]), "trim_right": sorted(trimmed[1])}


def _find_trimmed(
    tokenizer: Tokenizer, messages: Messages, parts: Parts, trimmed: tuple[set[str], set[str]]
) -> None:
    """Adds the leads whose message loses the white space on its left or on its right."""
    padded = [{**message, "content": f"{_PAD}{message['content']}{_PAD}"} for message in messages]
    rest = _render(tokenizer, padded)
    for lead, message in zip(_leads(messages), messages, strict=False):
        rest = rest.partition(parts[lead])[2] if parts[lead] else rest
        before, _, rest = rest.partition(message["content"])
        if not before.endswith(_PAD):
            trimmed[0].add(lead)
        if not rest.startswith(_PAD):
            trimmed[1].add(lead)


def _leads(messages: Messages) -> list[str]:
    """The part before each message, and the one that asks for an answer."""
    roles = ["start", *(message["role"] for message in messages), "assistant"]
    return [f"{a}_{b}" if a == "start" else f"{a}_to_{b}" for a, b in pairwise(roles)]


def _render(tokenizer: Tokenizer, messages: Messages) -> str:
    """The prompt with the formats of its dates."""
    return tokenizer.render_chat(
        messages, strftime_now=lambda form: f"{_DATE_START}{form}{_DATE_END}"
    )


def _join(messages: Messages, parts: Mapping[str, Any]) -> str:
    """The prompt as the runner makes it, but for the dates."""
    text = ""
    for lead, message in zip(_leads(messages), [*messages, {"content": ""}], strict=True):
        content = message["content"]
        content = content.lstrip() if lead in parts["trim_left"] else content
        content = content.rstrip() if lead in parts["trim_right"] else content
        text += parts[lead] + content
    return text


def _test(tokenizer: Tokenizer, parts: Parts) -> None:
    for messages in _conversations(tokenizer, "start_system" in parts):
        if _render(tokenizer, messages) != _join(messages, parts):
            raise _Unsupported("the chat template looks into the messages")
    leads = [text for text in parts.values() if isinstance(text, str)]
    if any(not _FORM.fullmatch(form) for text in leads for form in _DATE.findall(text)):
        raise _Unsupported("the chat template writes a date in a way of its own")
    messages = [{"role": "user", "content": "x"}]
    for day in _DAYS:
        ours = _dated(_join(messages, parts), day)
        if tokenizer.render_chat(messages, strftime_now=day.strftime) != ours:
            raise _Unsupported("the chat template calculates with the date")


def _dated(text: str, day: datetime) -> str:
    return _DATE.sub(lambda match: day.strftime(match[1]), text)


def _conversations(tokenizer: Tokenizer, has_system: bool) -> Iterator[Messages]:
    """Conversations that would show that a template depends on more than the roles' order."""

    def conversation(content: str, turns: int, *, system: bool, last: str) -> Messages:
        roles = ["user", "assistant"] * turns + ["user"]
        messages = [{"role": role, "content": content} for role in roles]
        messages[-1]["content"] = last
        return [{"role": "system", "content": content}] * system + messages

    contents = list(_CONTENTS)
    for literal in _literals(tokenizer):
        contents += [literal, f"a{literal}b{literal}c", f"{literal}\n{literal}"]
    for content in contents:
        for system in (False, True)[: 1 + has_system]:
            yield conversation(content, 2, system=system, last=content)
            yield conversation(content, 1, system=system, last="x")
    for turns in range(6):
        for system in (False, True)[: 1 + has_system]:
            yield conversation("x", turns, system=system, last="y")


def _literals(tokenizer: Tokenizer) -> list[str]:
    """The texts in the template's expressions: what it may look for in a message."""
    from jinja2 import nodes

    from pocketslm.runtime.tokenizer.jinja import environment

    assert tokenizer.chat_template is not None
    tree = environment().parse(tokenizer.chat_template)
    found = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return list(dict.fromkeys(found))[:_LITERALS]
