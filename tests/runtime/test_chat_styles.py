# ruff: noqa: E501 - templates as their authors write them
"""Templates in the styles of today's model families, against transformers."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import load_tokenizer_files
from tokenizer_support import CONFIG, IMPLEMENTATIONS, document

TOOLS = """{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' }}{{ tool | tojson }}
{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
"""
CALLS = """{%- for call in m.tool_calls %}
{%- set call = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
"""
# Looks for the last question, and keeps an answer's thoughts only after it.
THINKING = (
    TOOLS
    + """{%- set ns = namespace(seeking=true, last=messages | length - 1) %}
{%- for m in messages[::-1] %}
{%- set index = (messages | length - 1) - loop.index0 %}
{%- if ns.seeking and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.seeking = false %}{%- set ns.last = index %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content or '' %}{%- set thoughts = '' %}
{%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thoughts) %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
"""
    + CALLS
    + """{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)
# A system turn of its own with dates, tools in the first question, arguments as JSON.
DATED = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|im_start|>system<|im_end|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + system_message + '</s>' }}
{%- if tools is not none %}
{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{{- '<|im_start|>user<|im_end|>\\n\\nFunctions:\\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{{- first + '</s>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ['tool', 'ipython'] and 'tool_calls' not in message %}
{{- '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n' + message['content'] | trim + '</s>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant<|im_end|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}</s>' }}
{%- else %}
{{- '<|im_start|>ipython<|im_end|>\\n\\n' }}
{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
{{- '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_end|>\\n\\n' }}{%- endif %}"""
# The system message goes into the first question; contents may be lists of parts.
FOLDED = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set prefix = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\\n\\n' -%}
{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<|im_start|>' + role + '\\n' + (prefix if loop.first else '') }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim if item['type'] == 'text' else '<tool_call>' }}{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>model\\n' }}{%- endif -%}"""
# Gathers system messages in a namespace and asks whether a content is none.
GATHERED = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system='') %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<|user|>' + m['content'] }}{%- endif %}
{%- if m['role'] == 'assistant' and m['content'] is none %}
{%- for tool in m['tool_calls'] %}{{ ('<|assistant|>' if not ns.is_first else '\\n') + tool['type'] + ':' + tool['function']['name'] + '\\n```json\\n' + (tool['function']['arguments'] | tojson) + '\\n```' }}{%- set ns.is_first = true -%}{%- endfor %}{{ '<|im_end|>' }}
{%- endif %}
{%- if m['role'] == 'assistant' and m['content'] is not none %}{{ ('' if ns.is_tool else '<|assistant|>') + m['content'] + '</s>' }}{%- endif %}
{%- if m['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|assistant|>' }}{% endif %}"""
# Describes tools by macros that call themselves.
MACROS = """{%- macro kind(spec) -%}
{%- if spec.type == 'array' -%}{{ kind(spec['items']) + '[]' if spec['items'] else 'any[]' }}
{%- elif spec.enum -%}{{ '"' + spec.enum | join('" | "') + '"' }}
{%- elif spec.type == 'object' -%}{ {%- for name, value in spec.properties.items() -%}{{ name ~ ': ' ~ kind(value) }}{{ ', ' if not loop.last }}{%- endfor -%} }
{%- else -%}{{ spec.type | default('any', true) | replace('integer', 'number') }}{%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>system\\n' + 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' }}
{%- for tool in tools or [] %}{% set tool = tool.function %}
{{- '// ' + tool.description | upper + '\\ntype ' + tool.name + ' = (_: ' }}{{ kind(tool.parameters) }}{{ ') => any;\\n' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- for message in messages | rejectattr('role', 'equalto', 'system') %}
{%- if message.tool_calls is defined and message.tool_calls %}
{{- '<|im_start|>assistant to=' ~ message.tool_calls[0].function.name ~ '\\n' ~ (message.tool_calls[0].function.arguments | tojson) ~ '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
STYLES = {
    "thinking": THINKING,
    "dated": DATED,
    "folded": FOLDED,
    "gathered": GATHERED,
    "macros": MACROS,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'the <weather> & "more" of a city, é',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"enum": ["°C", "°F"]},
            },
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Åre 😀"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": '  Hello <b>W\u00f6rld</b> & "you"\n'}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ],
    "answered": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n b"}],
    "call": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "snow"},
        {"role": "assistant", "content": "It snows."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]}],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_styles_equal_transformers(style: str, conversation: str) -> None:
    """The same text, or an error in both, with tools and without."""
    from transformers.utils.chat_template_utils import render_jinja_template

    files = {
        "tokenizer.json": document("llama3"),
        "tokenizer_config.json": json.dumps(CONFIG),
        "chat_template.jinja": STYLES[style],
    }
    messages = CONVERSATIONS[conversation]
    for implementation in IMPLEMENTATIONS:
        tokenizer = load_tokenizer_files(files, implementation)  # type: ignore[arg-type]
        for tools in (None, [WEATHER]):
            for generation in (False, True):
                try:
                    (expected,), _ = render_jinja_template(
                        [messages],
                        tools=tools,
                        chat_template=STYLES[style],
                        add_generation_prompt=generation,
                        bos_token="<s>",
                        eos_token="</s>",
                        unk_token="<unk>",
                    )
                except Exception:
                    with pytest.raises(TokenizerError):
                        tokenizer.apply_chat_template(messages, generation, tools=tools)
                    continue
                ids = tokenizer.apply_chat_template(messages, generation, tools=tools)
                assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_dates_are_those_of_the_moment_of_use() -> None:
    files = {
        "tokenizer.json": document("llama3"),
        "tokenizer_config.json": json.dumps(CONFIG),
        "chat_template.jinja": "{{ strftime_now('%d %B %Y') }}",
    }
    tokenizer = load_tokenizer_files(files)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == datetime.now().strftime("%d %B %Y")
    day = datetime(2031, 5, 7)
    assert tokenizer.render_chat(messages, strftime_now=day.strftime) == "07 May 2031"
