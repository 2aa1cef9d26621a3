"""Chat templates: rendered as transformers renders them, but never letting a message inject.

A chat template is a Jinja program that prints special tokens and message texts into one string,
and that string no longer says which `<|im_end|>` came from the template and which from a user.
So the special tokens that the *template* writes are marked before it runs: in the parsed
template, every special token inside a literal is replaced by a private-use character that stands
for it, and so are `bos_token`, `eos_token` and the other token variables. Messages go in
unchanged. In the rendered string the private-use characters are the special tokens, and all the
rest is ordinary text, whatever the template does to a message: trim, join, split or change case.

A template may also build a token around a role, as `'<|' + message['role'] + '|>'`. A role
between two literals is recognised (by its name, `role`) and marked when the token is complete.
A template that assembles special tokens in any other way is refused with a `TokenizerError`, as
its tokens cannot be told from message text.

A message that contains a special token's text sees one difference from transformers: where a
template compares or splits messages at that token, it finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer.vocabulary import any_of

Message = Mapping[str, Any]
Fragment = str | int
"""Ordinary text, or the id of a special token."""

MAX_TEMPLATE = 1 << 16  # characters; the longest known ones have 30,000
MAX_REASON = 500  # characters of a template's own error
_PRIVATE_PLANES = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTROL_KEYS = frozenset({"role", "type"})
"""Fields of a message that steer a template and are not text for the model."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens (text -> id) that it may write.

    `variables` are the texts of `bos_token`, `eos_token` and so on.
    """

    source: str
    special_tokens: Mapping[str, int]
    variables: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        strftime_now: Callable[[str], str] | None = None,
    ) -> list[Fragment]:
        """The prompt as ordinary text and special tokens.

        `variables` are further names that the template can use, such as `enable_thinking`;
        `strftime_now` writes the date for it, by default today's.
        Raises `TokenizerError` where the template does not compile, rejects the messages, fails
        on them, asks for more steps or text than a prompt of these messages can need, or builds
        special tokens that cannot be told from message text.
        """
        try:
            inputs = {
                "messages": [_message(message) for message in messages],
                "tools": _plain(list(tools)) if tools is not None else None,
                "documents": _plain(list(documents)) if documents is not None else None,
                **{key: _plain(value) for key, value in (variables or {}).items()},
            }
        except RecursionError:
            raise TokenizerError(
                "the messages nest too deeply; expected lists and mappings as JSON has them; "
                "flatten them"
            ) from None
        marks = self._marks(inputs)
        given: dict[str, Any] = {n: marks.get(text, text) for n, text in self.variables.items()}
        given |= {"add_generation_prompt": add_generation_prompt}
        given |= {"strftime_now": strftime_now} if strftime_now else {}
        fragments = self._fragments({**given, **inputs}, marks)
        if any(self._written_out(part) for part in fragments):
            neutral = {key: _neutral(value) for key, value in inputs.items()}
            self._check_written_by_messages({**given, **neutral}, marks)
        return fragments

    def _check_written_by_messages(
        self, neutral: Mapping[str, Any], marks: Mapping[str, str]
    ) -> None:
        """Refuses a template that writes special tokens out as text even when no message does."""
        try:
            fragments = self._fragments(neutral, marks)
        except TokenizerError:  # it needs the real messages; what they hold stays ordinary text
            return
        for part in fragments:
            if token := self._written_out(part):
                raise TokenizerError(
                    f"the chat template assembles the special token {token!r} from pieces, so it "
                    "cannot be told from message text; expected it whole in a literal or around "
                    "a role; write it out in chat_template.jinja"
                )

    def _fragments(self, inputs: Mapping[str, Any], marks: Mapping[str, str]) -> list[Fragment]:
        from pocketslm.runtime.tokenizer.metering import OverBudget, metered, size_of

        if len(self.source) > MAX_TEMPLATE:
            raise TokenizerError(
                f"the chat template has {len(self.source)} characters; expected at most "
                f"{MAX_TEMPLATE}; use another template"
            )
        try:
            with metered(size_of(inputs)):
                rendered = _compile(self.source, tuple(marks.items())).render(**inputs)
        except OverBudget as error:
            raise TokenizerError(
                f"the chat template was stopped: it asks for too many {error}; expected work in "
                "proportion to the messages; use another template"
            ) from None
        except Exception as error:  # a template is a program of its own, and may fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
            raise TokenizerError(
                f"the chat template failed: {reason}; expected messages "
                "with the roles and fields that it knows; change the messages or the template"
            ) from error
        if not marks:
            return [rendered] if rendered else []
        ids = {mark: self.special_tokens[text] for text, mark in marks.items()}
        parts = re.split(f"([{''.join(ids)}])", rendered)
        return [ids.get(part, part) for part in parts if part]

    def _marks(self, inputs: Mapping[str, Any]) -> dict[str, str]:
        """Special token text -> private-use character that occurs nowhere in the inputs."""
        texts = [self.source, *self.special_tokens, *self.variables.values(), *_strings(inputs)]
        used = {ord(char) for text in texts if not text.isascii() for char in text}
        count = len(self.special_tokens)
        for first, last in _PRIVATE_PLANES:
            for start in range(first, last + 2 - count, max(count, 1)):
                if used.isdisjoint(range(start, start + count)):
                    codes = range(start, start + count)
                    return dict(zip(self.special_tokens, map(chr, codes), strict=True))
        raise TokenizerError(
            "the messages use up the private-use characters of Unicode, which mark special tokens "
            "in a chat template; expected text; remove these characters"
        )

    def _written_out(self, part: Fragment) -> str | None:
        """The first special token that stands in ordinary text; None if there is none."""
        if isinstance(part, int) or self._special is None:
            return None
        match = self._special.search(part)
        return match.group() if match else None

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        return any_of(self.special_tokens)


def _message(message: Message) -> dict[str, Any]:
    """What the template sees: keys whose value is None are dropped, but for the content, for which
    templates ask; reasoning is also found under the names that templates use for it."""
    if not isinstance(message, Mapping):
        raise TokenizerError(
            f"a chat message is {type(message).__name__}; expected a mapping with 'role' and "
            "'content'; pass a list of such mappings"
        )
    given = {k: v for k, v in message.items() if v is not None or k == "content"}
    plain: dict[str, Any] = _plain(given)
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """A copy of JSON-like data made of nothing but built-in types, safe inside the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TokenizerError(
        f"a chat message holds a {type(value).__name__}; expected text, numbers, lists and "
        "mappings, as JSON has them; convert it first"
    )


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _neutral(value: Any) -> Any:
    """Plain data with every text replaced by `x`, except what steers the template."""
    if isinstance(value, str):
        return "x"
    if isinstance(value, Mapping):
        return {k: v if k in _CONTROL_KEYS else _neutral(v) for k, v in value.items()}
    return [_neutral(item) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=8)
def _compile(source: str, marks: tuple[tuple[str, str], ...]) -> Any:
    """The Jinja template with the special tokens of its literals replaced by their marks."""
    from pocketslm.runtime.tokenizer.jinja import compiled

    return compiled(source, dict(marks))
