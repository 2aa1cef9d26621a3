"""Chats of pocketslm-run against the templates that they were taken from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import native_support
import pytest
from native_runner import Runner, running

from pocketslm.export.lower.native import lower
from pocketslm.export.lower.native_chat import chat_parts
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.export.lower.trace import trace
from pocketslm.runtime.tokenizer import Tokenizer, load_tokenizer_files
from tokenizer_support import CONFIG, document

SEED = 23
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>\n' }}"


def each(content: str, before: str = "") -> str:
    """A template that writes each message's `content`, an expression, in a turn of its own."""
    return f"{before}{{% for m in messages %}}{TURN.replace('CONTENT', content)}{{% endfor %}}{ASK}"


TAKEN = {
    "plain": each("m['content']"),
    "trimmed": each("m['content'] | trim"),
    "trimmed on the right": each("m['content'].rstrip()"),
    "the user's trimmed": each("(m['content'].strip() if m['role'] == 'user' else m['content'])"),
    "dated": each("m['content']", "{{ bos_token }}{{ 'It is ' + strftime_now('%d %b %Y') }}.\n"),
    "two dates": each("m['content']", "{{ strftime_now('%A') }}{{ strftime_now('%j, %B') }}"),
    "without a system role": each(
        "m['content'] | trim",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}",
    ),
    "with a system of its own": each(
        "m['content']",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}",
    ),
    "system in the first question": (
        "{{ bos_token }}{% set start = messages[0]['content'] + '\n\n' if messages[0]['role'] =="
        " 'system' else '' %}{% for m in messages if m['role'] != 'system' %}"
        "{{ '<|user|>' + (start if loop.first else '') + m['content'] if m['role'] == 'user' else"
        " '<|assistant|>' + m['content'] }}</s>{% endfor %}<|assistant|>"
    ),
    "nothing between": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
NOT_TAKEN = {
    "thoughts": each("m['content'].split('</think>')[-1].lstrip('\n')"),
    "thoughts of answers": each(
        "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
    ),
    "lines only": each("m['content'].strip('\n')"),
    "the last message": each("(m['content'] if loop.last else m['content'] | trim)"),
    "case": each("m['content'] | lower"),
    "a word": each(
        "('tool: ' + m['content'] if m['content'].startswith('<call>') else m['content'])"
    ),
    "count": each("m['content']", "{{ messages | length }}"),
    "the fifth turn": each("(m['content'] if loop.index < 9 else 'later')"),
    "empty": each("(m['content'] or 'nothing')"),
    "quotes": each("m['content'] | tojson"),
    "calculated": each("m['content']", "{{ strftime_now('%Y') | int + 1 }}"),
    "a season": each("m['content']", "{{ 'May' if strftime_now('%m') == '05' else 'no' }}"),
    "time zone": each("m['content']", "{{ strftime_now('%H:%M %Z') }}"),
    "part of a date": each("m['content']", "{{ strftime_now('%B')[:3] }}"),
    "two of each": each("m['content'] + m['content']"),
    "none": each("'x'"),
    "control characters": each("m['content']", "{{ '\x01%Y\x02' }}"),
    "an error": "{{ raise_exception('no') }}",
}


def tokenizer_with(template: str, style: str = "llama3") -> Tokenizer:
    files = {
        "tokenizer.json": document(style),
        "tokenizer_config.json": json.dumps(CONFIG),
        "chat_template.jinja": template,
    }
    return load_tokenizer_files(files)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_template_that_looks_into_messages_gives_a_reason(name: str) -> None:
    parts, reason = chat_parts(tokenizer_with(NOT_TAKEN[name]))
    assert parts == {"eos": [2]}
    assert "template" in reason
    assert "\n" not in reason


def test_without_a_template_the_ids_that_end_an_answer_stay() -> None:
    assert chat_parts(tokenizer_with("")) == ({"eos": [2]}, "it has no chat template")


def conversations(rng: random.Random, *, system: bool) -> list[list[dict[str, str]]]:
    pieces = ["a", "the quick", " ", "\n", "\t", "\u00a0", "\u3000", "\x1f", "\x85", "é", "😀"]
    pieces += [
        "<|im_start|>",
        "</s>",
        "<think>",
        "</think>",
        "\x01%Y\x02",
        "{{ x }}",
        "%d",
        '"',
        "<",
    ]
    found = []
    for _ in range(40):
        roles = ["user", "assistant"] * rng.randrange(4) + ["user"]
        roles = ["system"] * (system and rng.random() < 0.5) + roles
        found.append(
            [
                {"role": r, "content": "".join(rng.choices(pieces, k=rng.randrange(7)))}
                for r in roles
            ]
        )
    return found


@pytest.fixture(scope="module")
def runner(runner_path: Path) -> Any:
    with running([str(runner_path)]) as started:
        yield started


def loaded(runner: Runner, folder: Path, tokenizer: Tokenizer, style: str) -> dict[str, Any]:
    """The runner with a model of this tokenizer; the chat section that it has."""
    packed, reason = pack_tokenizer(document(style))
    assert packed is not None, reason
    parts, _ = chat_parts(tokenizer)
    config = native_support.tiny_config(vocab_size=tokenizer.vocab_size)
    weights = native_support.tiny_weights(config, lambda _, weight: weight)
    lower(
        trace(config, config.max_position_embeddings),
        weights,
        folder / "model.slm",
        tokenizer=packed,
        chat=parts,
    )
    runner.ask(op="load", path=str(folder / "model.slm"), threads=1, context=300)
    return parts


@pytest.mark.parametrize("name", TAKEN)
def test_the_runners_chat_is_the_templates(name: str, runner: Runner, tmp_path: Path) -> None:
    style = "llama2" if name == "plain" else "llama3"
    tokenizer = tokenizer_with(TAKEN[name], style)
    parts = loaded(runner, tmp_path, tokenizer, style)
    has_system = "start_system" in parts
    assert has_system == (name != "without a system role")
    for messages in conversations(random.Random(SEED), system=has_system):
        expected = tokenizer.apply_chat_template(messages)
        assert runner.ask(op="encode", messages=messages)["tokens"] == expected, messages


def test_what_a_chat_cannot_take_is_said(runner: Runner, tmp_path: Path) -> None:
    loaded(runner, tmp_path, tokenizer_with(TAKEN["without a system role"]), "llama3")
    system, user = {"role": "system", "content": "x"}, {"role": "user", "content": "x"}
    event = runner.ask(op="encode", messages=[system, user])
    assert event["event"] == "error"
    assert "takes no system message" in event["message"]
    event = runner.ask(op="encode", messages=[user, user])
    assert "in turn; got 'user' after 'user'" in event["message"]

    loaded(runner, tmp_path, tokenizer_with(NOT_TAKEN["thoughts"]), "llama3")
    event = runner.ask(op="encode", messages=[user])
    assert "no chat template" in event["message"]


def test_a_model_without_a_chat_still_knows_its_end(runner: Runner, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(NOT_TAKEN["thoughts"])
    loaded(runner, tmp_path, tokenizer, "llama3")
    tokens, _, done = runner.generate(tokens=[5, 9, 70], max_tokens=40, ignore_eos=True)
    assert done["reason"] == "length"
    packed, _ = pack_tokenizer(document("llama3"))
    config = native_support.tiny_config(vocab_size=tokenizer.vocab_size)
    weights = native_support.tiny_weights(config, lambda _, weight: weight)
    end = {"eos": [tokens[3]]}
    lower(
        trace(config, config.max_position_embeddings),
        weights,
        tmp_path / "model.slm",
        tokenizer=packed,
        chat=end,
    )
    runner.ask(op="load", path=str(tmp_path / "model.slm"), threads=1, context=300)
    stopped, _, done = runner.generate(tokens=[5, 9, 70], max_tokens=40)
    assert done["reason"] == "eos"
    assert stopped == tokens[: tokens.index(tokens[3])]
