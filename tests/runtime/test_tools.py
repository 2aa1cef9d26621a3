"""Calls of tools as each family writes them, and held to the schema of the tool."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from structure_support import accepts, byte_texts

import support
from pocketslm.errors import UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.constraint import Constraint, Grammar
from pocketslm.runtime.model import Model, Record
from pocketslm.runtime.tool_formats import (
    FORMATS,
    Call,
    format_of,
    functions_of,
    python_grammar,
    read_calls,
)
from pocketslm.runtime.tools import _Writer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
DRAWN = GenerationConfig(do_sample=True, temperature=100.0, top_k=0, max_new_tokens=3)
CALL = Call("get_weather", {"city": 'São "P"', "days": 3})
BY_NAME = {form.name.split(",")[0]: form for form in FORMATS}
HERMES = """{% if tools %}Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: """


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("Hermes", '{"name": "get_weather", "arguments": {"city": "São \\"P\\"", "days": 3}}'),
        ("Granite 3", '[{"name": "get_weather", "arguments": {"city": "São \\"P\\"", "days": 3}}]'),
        ("Llama 3", '{"name": "get_weather", "parameters": {"city": "São \\"P\\"", "days": 3}}'),
        ("LFM2", '[get_weather(city="São \\"P\\"", days=3)]'),
        ("FunctionGemma", 'call:get_weather{city:<escape>São "P"<escape>,days:3}'),
    ],
)
def test_each_family_is_read(family: str, text: str) -> None:
    assert read_calls(BY_NAME[family], text) == [CALL]
    for broken in ("", text[:-2], "get_weather", "{}", "[]x", "f(1)", "call:x"):
        with pytest.raises(UsageError, match="no call that can be read"):
            read_calls(BY_NAME[family], broken)


def test_formats_are_known_by_the_template() -> None:
    templates = {
        "LFM2": "{{ tools }}<|tool_call_start|>",
        "FunctionGemma": "{{ tools }}<start_function_call>",
        "Granite 3": "{{ tools }}<|tool_call|>",
        "Hermes": "{{ tools }}<tool_call>",
        "Llama 3": '{{ tools }}ipython {"name": "parameters"',
    }
    for name, template in templates.items():
        assert format_of(template) is BY_NAME[name]
    for template in (None, "{{ messages }}", "{{ tools }}"):
        with pytest.raises(UsageError, match="no calls of tools in a known form"):
            format_of(template)


def test_tools_that_make_no_sense() -> None:
    for tools, message in (
        ([], "no tools"),
        ([{"name": "a b"}], "a tool's name"),
        ([{"function": 3}], "a tool's name"),
        (["a"], "a tool's name"),
        ([CLOCK, CLOCK], "two tools"),
        ([{"name": "a", "parameters": 3}], "no JSON schema"),
    ):
        with pytest.raises(UsageError, match=message):
            functions_of(tools)  # type: ignore[arg-type]


def test_calls_in_python_name_tools_and_parameters() -> None:
    grammar = Grammar("grammar", python_grammar(functions_of([WEATHER, CLOCK])))
    constraint = Constraint(grammar, byte_texts())
    for text in ('[get_weather(city="a\\"b", days=3)]', "[clock(), clock()]", "[get_weather()]"):
        assert accepts(constraint, text)
        assert read_calls(BY_NAME["LFM2"], text)
    for text in ("[other()]", "[get_weather(town=3)]", "[clock(city=3)]", "clock()"):
        assert not accepts(constraint, text)


def test_calls_in_python_have_names_that_python_has_not() -> None:
    """A tool of the name ``look-up``, a parameter ``from``: its schema calls them so."""
    arguments = {"from": "Zürich, (HB)", "größe": [1, {"a": "]"}], "😀": None, "a b": True}
    tool = {"name": "look-up", "parameters": {"properties": {key: {} for key in arguments}}}
    text = '[look-up(from="Zürich, (HB)", größe=[1, {"a": "]"}], 😀=None, a b=True), look-up()]'
    grammar = Grammar("grammar", python_grammar(functions_of([tool])))
    assert accepts(Constraint(grammar, byte_texts()), text)
    assert read_calls(BY_NAME["LFM2"], text) == [Call("look-up", arguments), Call("look-up", {})]
    for broken in (
        "[]",
        "[a(b=1, b=2)]",
        "[a(b=1,)]",
        "[a(b=c)]",
        "[a(b=[)]",
        '[a(b=")]',
        "[a()b]",
    ):
        with pytest.raises(UsageError, match="no call that can be read"):
            read_calls(BY_NAME["LFM2"], broken)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of random weights with a template of Hermes' kind."""
    folder = tmp_path_factory.mktemp("tools")
    checkpoint = support.write_hf(
        folder / "hf", replace(support.TINY, max_position_embeddings=2048)
    )
    (checkpoint / "chat_template.jinja").write_text(HERMES)
    export_bundle(open_checkpoint(checkpoint), folder / "bundle")
    return Model.load(folder / "bundle", "native", threads=1)


def valid(arguments: dict[str, Any]) -> None:
    schema = functions_of([WEATHER])["get_weather"]
    Draft202012Validator(schema).validate(json.loads(json.dumps(arguments)))


def test_a_random_model_calls_as_the_schema_says(model: Model) -> None:
    named = model.reply("hi", tools=[WEATHER, CLOCK], tool_choice="get_weather")
    assert [call.name for call in named.calls] == ["get_weather"]
    valid(named.calls[0].arguments)
    for seed in range(8):
        reply = model.reply("x", tools=[WEATHER, CLOCK], tool_choice="required", seed=seed)
        (call,) = reply.calls
        assert call.name in ("get_weather", "clock")
        if call.name == "get_weather":
            valid(call.arguments)
        assert reply.text == ""


def test_a_model_may_leave_tools_alone(model: Model) -> None:
    reply = model.reply("hi", tools=[WEATHER], max_new_tokens=5)
    assert reply.calls == ()
    assert len(reply.tokens) == 5
    none = model.reply("hi", tools=[WEATHER], tool_choice="none", max_new_tokens=5)
    assert none.tokens == model.reply("hi", max_new_tokens=5).tokens


def test_a_model_that_begins_calls_makes_them(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, two calls and the end, as the model itself would write them."""
    script = ["Let me see. <tool_call>", None, "\n<tool_call>", None, "That is all."]
    whole = model.generate

    def generate(prompt: Any, config: Any = None) -> Any:
        text = script.pop(0)
        if text is None:  # a call: the model's own, held to the schema
            assert config.json_schema
            yield from whole(prompt, config)
            return
        tokens = model.tokenize(text)
        shown = text.partition("<tool_call>")[0]
        finish = "stop" if "<tool_call>" in text else "eos"
        for at, token in enumerate(tokens):
            last = at == len(tokens) - 1
            yield Record(token, shown if last else "", None, 0, finish if last else None)

    monkeypatch.setattr(model, "generate", generate)
    reply = model.reply("hi", tools=[WEATHER])
    assert [call.name for call in reply.calls] == ["get_weather"] * 2
    assert reply.text == "Let me see. That is all."
    assert reply.finish == "eos"


def test_an_answer_without_marks_is_drawn_as_it_began(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is a call is said by its beginning, which is not another one then."""
    writer = _Writer(model, BY_NAME["Llama 3"], functions_of([CLOCK]), DRAWN)
    writer.ids = model.prompt_ids("hi")
    seeds = []

    def generate(prompt: Any, config: Any = None) -> Any:
        seeds.append(config.seed)
        yield Record(70, "a", None, 0, "length")

    monkeypatch.setattr(model, "generate", generate)
    writer.text_or_calls()
    assert writer.text == "a"
    begun, whole = seeds
    assert begun == whole is not None


def test_choices_that_make_no_sense(model: Model) -> None:
    with pytest.raises(UsageError, match="expected auto, none, required or a tool"):
        model.reply("hi", tools=[WEATHER], tool_choice="weather")
    with pytest.raises(UsageError, match="something else"):
        model.reply("hi", tools=[WEATHER], regex="a")
    odd = {"name": "f", "parameters": {"type": "object", "x-odd": 1}}
    with pytest.raises(UsageError, match="'x-odd' is not supported"):
        model.reply("hi", tools=[odd], tool_choice="required")
