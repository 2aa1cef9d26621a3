"""Answers that are held to a schema: every one validates, and others agree on what is one.

The schemas are made by chance from seeds that no other test or harness has used.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from structure_support import (
    END,
    SchemaMaker,
    accepts,
    byte_texts,
    changed,
    simple,
    usual_pieces,
    write_by_chance,
)

from pocketslm.errors import UsageError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.constraint import Constraint, Grammar, TokenTexts
from pocketslm.runtime.model import Model

SCHEMAS, COMPARED, FIRST_SEED = 1000, 300, 700_000
# What a maker of schemas by chance may run into.
MAY_BE_REFUSED = ("no text matches", "together with", "15 significant digits")


def grammar_of(schema: Any) -> Grammar | None:
    try:
        return Grammar("json_schema", json.dumps(schema))
    except UsageError as error:
        if any(part in str(error) for part in MAY_BE_REFUSED):
            return None
        raise


def test_every_finished_answer_validates() -> None:
    pieces = usual_pieces()
    texts = TokenTexts(pieces, [END])
    finished = unfinished = 0
    for seed in range(FIRST_SEED, FIRST_SEED + SCHEMAS):
        schema = SchemaMaker(seed).make()
        if (grammar := grammar_of(schema)) is None:
            continue
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        constraint, rng = Constraint(grammar, texts), random.Random(seed)
        for _ in range(2):
            made = write_by_chance(constraint, pieces, rng)
            if made is None:
                unfinished += 1
                continue
            finished += 1
            validator.validate(json.loads(made))
    assert finished > 1.7 * SCHEMAS
    assert unfinished < 0.02 * finished


def test_llguidance_and_jsonschema_agree_on_texts() -> None:
    """Of what a schema allows and of what is nearly that, all three allow the same."""
    llguidance = pytest.importorskip("llguidance")
    theirs = llguidance.LLTokenizer("byte")
    texts, pieces = byte_texts(), [bytes([byte]) for byte in range(256)] + [b""]
    schemas = allowed = refused = 0
    for seed in range(2 * FIRST_SEED, 2 * FIRST_SEED + COMPARED):
        schema = SchemaMaker(seed, formats=False).make()  # of which each has its own idea
        if (grammar := grammar_of(schema)) is None:
            continue
        source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(theirs, source, log_level=0)
        assert not matcher.get_error()
        schemas += 1
        validator = Draft202012Validator(schema)
        constraint, rng = Constraint(grammar, texts), random.Random(seed)
        for _ in range(3):
            if (made := write_by_chance(constraint, pieces, rng)) is None:
                continue
            value = json.loads(made)
            for other in [value, *(changed(value, rng) for _ in range(5))]:
                text = json.dumps(other, ensure_ascii=False)
                if not simple(other) or "\x7f" in text:  # which llguidance escapes only
                    continue
                ids = [*text.encode(), theirs.eos_token]
                ours = accepts(constraint, text)
                assert ours == validator.is_valid(other), (schema, text)
                assert ours == (matcher.validate_tokens(ids) == len(ids)), (schema, text)
                allowed += ours
                refused += not ours
    assert schemas >= 200
    assert min(allowed, refused) > 500


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "native", threads=1)


def answer(model: Model, **options: Any) -> tuple[str, str | None]:
    records = list(model.generate("the inner voice", GenerationConfig(**options)))
    return "".join(record.text for record in records), records[-1].finish


@pytest.mark.parametrize("backend", ["native", "runner", "onnx"])
def test_a_random_model_answers_by_the_schema(tiny_bundle: Path, backend: str) -> None:
    model = Model.load(tiny_bundle, backend, threads=1)
    for options in ({}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}):
        text, finish = answer(model, json_schema=PERSON, **options)
        if finish not in ("length", "context"):
            Draft202012Validator(PERSON).validate(json.loads(text))
            assert finish == "stop"
    assert answer(model, regex="(yes|no)!") in [("yes!", "stop"), ("no!", "stop")]
    assert answer(model, grammar='root ::= [0-9]{3} "."')[0].rstrip(".").isdigit()
    with pytest.raises(UsageError, match="'patternProperties' is not supported"):
        list(model.generate("a", GenerationConfig(json_schema={"patternProperties": {}})))


def test_the_runner_answers_with_the_same_tokens(tiny_bundle: Path) -> None:
    here, child = (Model.load(tiny_bundle, name, threads=1) for name in ("native", "runner"))
    for options in (
        {"json_schema": PERSON},
        {"regex": "[a-z ]{5,40}\\."},
        {"grammar": 'root ::= "a" root "b" | [cd]+', "max_new_tokens": 20},
    ):
        ours, theirs = answer(here, **options), answer(child, **options)
        assert ours == theirs


def test_a_text_that_may_end_ends_with_the_model(model: Model) -> None:
    records = list(model.generate("x", GenerationConfig(regex="[^a]*", max_new_tokens=200)))
    assert "a" not in "".join(record.text for record in records)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="json_schema and regex together"):
        GenerationConfig(json_schema={}, regex="a")
    with pytest.raises(UsageError, match="ignore_eos"):
        GenerationConfig(regex="a", ignore_eos=True)
    with pytest.raises(UsageError, match="no JSON"):
        GenerationConfig(json_schema={"const": float("nan")})
    assert GenerationConfig(json_schema=True).constraint == ("json_schema", "true")
    assert GenerationConfig().constraint is None


@pytest.mark.skipif("JSON_SCHEMA_TEST_SUITE" not in os.environ, reason="needs a copy of the suite")
def test_the_official_suite() -> None:
    """Of json-schema-org/JSON-Schema-Test-Suite: what is accepted is valid; most that is valid is.

    $JSON_SCHEMA_TEST_SUITE is its folder. Schemas that are refused by name are left out.
    """
    folder = Path(os.environ["JSON_SCHEMA_TEST_SUITE"]) / "tests" / "draft2020-12"
    texts = byte_texts()
    right, narrower = 0, []
    for file in sorted(folder.glob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            try:
                grammar = Grammar("json_schema", json.dumps(group["schema"]))
            except UsageError:
                continue
            constraint = Constraint(grammar, texts)
            for case in group["tests"]:
                ours = accepts(constraint, json.dumps(case["data"], ensure_ascii=False))
                assert case["valid"] or not ours, (file.name, group["description"], case)
                right += ours == case["valid"]
                narrower += [case["description"]] if ours != case["valid"] else []
    assert right > 300
    assert len(narrower) < 0.1 * right, narrower
