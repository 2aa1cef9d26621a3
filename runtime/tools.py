"""Answers that may call tools: the template shows them, and the schema of each holds its calls."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from pocketslm.errors import UsageError
from pocketslm.runtime.calls import call_schema
from pocketslm.runtime.config import MOST_SEED, GenerationConfig
from pocketslm.runtime.tool_formats import (
    Call,
    ToolFormat,
    format_of,
    functions_of,
    python_grammar,
    read_calls,
)

if TYPE_CHECKING:
    from pocketslm.runtime.answer import Finish
    from pocketslm.runtime.model import Reply, TextModel

MOST_CALLS = 8  # in one answer


def reply_with_tools(
    model: TextModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    config: GenerationConfig,
) -> Reply:
    """Answer messages, and read the calls in the answer.

    choice: "auto", "required", or the name of the tool to call. Raises UsageError.
    """
    functions = functions_of(tools)
    form = format_of(model.tokenizer.chat_template)
    if config.constraint is not None:
        raise UsageError("an answer with tools cannot be held to something else, too")
    if choice not in ("auto", "required"):
        if choice not in functions:
            raise UsageError(f"tool_choice is {choice!r}, expected auto, none, required or a tool")
        functions = {choice: functions[choice]}
    writer = _Writer(model, form, functions, config)
    writer.ids = model.tokenizer.apply_chat_template(messages, tools=tools)
    prompt = len(writer.ids)
    if choice == "auto":
        writer.text_or_calls()
    else:
        writer.call()
    return writer.reply(prompt)


class _Writer:
    """Builds an answer out of text and calls."""

    def __init__(
        self,
        model: TextModel,
        form: ToolFormat,
        functions: Mapping[str, Mapping[str, Any]],
        config: GenerationConfig,
    ) -> None:
        self.model, self.form, self.config = model, form, config
        schema = call_schema(functions, form.arguments)
        if form.listed:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MOST_CALLS}
        # FunctionGemma's strings stand between special tokens, which no grammar can ask for.
        held: dict[str, Any] = {}
        if form.style == "json":
            held = {"json_schema": schema}
        elif form.style == "python":
            held = {"grammar": python_grammar(functions)}
        stops = (form.end,) if form.style == "gemma" else ()
        self.held = config.but(stop_strings=stops, **held)
        self.made: list[int] = []
        self.names = set(functions)
        self.ids: list[int] = []
        self.text = ""
        self.tokens: list[int] = []
        self.calls: list[Call] = []
        self.finish: Finish | None = None

    def text_or_calls(self) -> None:
        form = self.form
        if not form.begin:
            self._whole_answer()
            return
        while len(self.calls) < MOST_CALLS:
            stops = (*self.config.stop_strings, form.begin)
            text = self._generate(self.config.but(stop_strings=stops))
            self.text += text if not self.calls or text.strip() else ""
            # A stop string of the caller's ends the answer; only the mark begins a call.
            if self.finish != "stop" or not self._began(text):
                return
            self.ids += self.model.tokenizer.encode(text)
            if not self.call():
                return

    def _began(self, text: str) -> bool:
        """Whether the mark of a call ended the text."""
        tokenizer = self.model.tokenizer
        mark = tokenizer.token_id(self.form.begin)
        if mark is not None:
            return bool(self.tokens) and self.tokens[-1] == mark
        return text + self.form.begin in tokenizer.decode(self.made)

    def _whole_answer(self) -> None:
        """An answer that begins with a brace is a call."""
        begun = ""
        if self.config.samples and self.config.seed is None:  # so that it begins alike again
            self.config = self.config.but(seed=secrets.randbelow(MOST_SEED))
        with closing(self.model.generate(self.ids, self.config)) as records:  # type: ignore[type-var]
            for record in records:
                begun += record.text
                if begun.strip():
                    break
        if begun.lstrip().startswith("{"):
            self.call()
        else:
            self.text = self._generate(self.config)

    def call(self) -> bool:
        """Write one call, or one list of calls. Returns False if the answer ends with it."""
        if self.form.begin:
            self.ids += self.model.tokenizer.encode(self.form.begin, parse_special=True)
        text = self._generate(self.held)
        if self.finish in ("length", "context"):
            return False  # it is not whole
        calls = read_calls(self.form, text)
        for one in calls:
            if one.name not in self.names:
                raise UsageError(f"the model called {one.name}, which is none of the tools")
        self.calls += calls
        if self.form.listed or self.form.style == "python" or not self.form.begin:
            return False
        self.ids += self.model.tokenizer.encode(text)
        if self.form.end:
            self.ids += self.model.tokenizer.encode(self.form.end, parse_special=True)
        return True

    def _generate(self, config: GenerationConfig) -> str:
        left = config.max_new_tokens
        if left is not None:
            left = max(1, left - len(self.tokens))
        records = list(self.model.generate(self.ids, config.but(max_new_tokens=left)))
        self.made = [record.token for record in records]
        self.tokens += self.made
        self.finish = records[-1].finish if records else None
        return "".join(record.text for record in records)

    def reply(self, prompt: int) -> Reply:
        from pocketslm.runtime.model import Reply

        text = self.text.strip() if self.calls else self.text
        return Reply(text, tuple(self.tokens), self.finish, prompt, tuple(self.calls))
