"""Masks against the bytes of each token, expressions against Python's, and what is refused."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from structure_support import END, accepts, byte_texts, usual_pieces, write_by_chance

from pocketslm.errors import UsageError
from pocketslm.runtime.constraint import Constraint, Grammar, TokenTexts

PIECES = usual_pieces()


@pytest.fixture(scope="module")
def usual() -> TokenTexts:
    return TokenTexts(PIECES, [END])


@pytest.fixture(scope="module")
def single() -> TokenTexts:
    return byte_texts()


SOURCES = {
    "text": ("json_schema", {"type": "string"}),
    "short text": ("json_schema", {"type": "string", "minLength": 2, "maxLength": 9}),
    "object": ("json_schema", {"type": "object"}),
    "alternatives": (
        "json_schema",
        {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "array"}]},
    ),
    "pattern": ("json_schema", {"type": "string", "pattern": "^[a-z é]{3,12}$"}),
    "two lengths": (
        "json_schema",
        {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 5}]},
    ),
    "anything": ("json_schema", True),
    "characters": ("regex", "[^x]{2,7}|x(ab?)*日.{1,3}"),
    "words": ("regex", "( ?[a-z]+){1,3}"),
    "grammar": ("grammar", 'root ::= "[" (root ("," root)*)? "]" | [0-9]+\n'),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_mask_is_what_each_token_alone_would_be(name: str, usual: TokenTexts) -> None:
    kind, source = SOURCES[name]
    text = source if isinstance(source, str) else json.dumps(source)
    constraint = Constraint(Grammar(kind, text), usual)  # type: ignore[arg-type]
    rng = random.Random(name)
    for _ in range(4):
        written: list[int] = []
        constraint.restart()
        for _ in range(12):
            allowed = constraint.allowed()
            single = [_may_follow(constraint, written, token) for token in range(len(PIECES))]
            assert allowed.tolist() == single
            assert allowed[END] == constraint.may_end
            chosen = int(rng.choice(np.flatnonzero(allowed)))
            if chosen == END:
                break
            written.append(chosen)
            _at(constraint, written)
            if constraint.must_end:
                break


def _at(constraint: Constraint, tokens: list[int]) -> None:
    constraint.restart()
    for token in tokens:
        constraint.advance(token)


def _may_follow(constraint: Constraint, tokens: list[int], token: int) -> bool:
    _at(constraint, tokens)
    try:
        constraint.advance(token)
    except UsageError:
        return False
    finally:
        _at(constraint, tokens)
    return True


def test_logits_of_others_are_minus_infinity(usual: TokenTexts) -> None:
    constraint = Constraint(Grammar("regex", "[0-9]+"), usual)
    constraint.advance(PIECES.index(b"12"))
    logits = np.arange(len(PIECES), dtype=np.float32)
    constraint.apply(logits)
    allowed = constraint.allowed()
    assert np.array_equal(np.isfinite(logits), allowed)
    assert np.array_equal(logits[allowed], np.flatnonzero(allowed))
    with pytest.raises(UsageError, match="logits for a vocabulary"):
        constraint.apply(np.zeros(5, np.float32))


def test_a_first_space_that_the_decoder_drops() -> None:
    texts = TokenTexts([b" yes", b"yes", b" ", b"  yes", b" no"], strip=True)
    constraint = Constraint(Grammar("regex", "(yes)+"), texts)
    assert constraint.allowed().tolist() == [True, True, True, False, False]
    constraint.advance(0)
    assert constraint.allowed().tolist() == [False, True, False, False, False]
    constraint.restart()
    spaced = Constraint(Grammar("regex", " ?yes"), texts)
    assert spaced.allowed().tolist() == [True, True, True, True, False]


def test_a_vocabulary_that_cannot_write_it() -> None:
    constraint = Constraint(Grammar("regex", "ab"), TokenTexts([b"a", b"c"]))
    constraint.advance(0)
    with pytest.raises(UsageError, match="no token of the vocabulary"):
        constraint.apply(np.zeros(2, np.float32))


EXPRESSIONS = (
    r"[a-c]+\d{2,3}(foo|bar)*",
    r"(a|b)*a(a|b){3}",
    r"\w+\s\W?",
    r"[^a-c\d]{0,4}",
    r"a{3}|b{2,}|c{0,2}|d{1,2}?",
    r"é.\u00e9|\x41[\x30-\x39]",
    r"(?:ab){2,70}",
    r"((a?){3}b){1,9}c",
    r"^a.b$|^c|d$",
    r"(?P<name>a)[-b\]]",
    r"\.\*\\\[\/",
    r"",
    r"(|a)b",
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_those_of_python(expression: str, single: TokenTexts) -> None:
    constraint = Constraint(Grammar("regex", expression), single)
    theirs = re.compile(expression.replace(r"\/", "/"), re.ASCII)
    rng = random.Random(expression)
    alphabet = "abcd1 9éA0_-]*.[\\/\nfor"
    texts = [
        "",
        "ab" * 40,
        *("".join(rng.choices(alphabet, k=rng.randint(0, 6))) for _ in range(500)),
    ]
    pieces = [bytes([byte]) for byte in range(256)] + [b""]
    whole = 0
    for _ in range(40):
        if (made := write_by_chance(constraint, pieces, rng)) is not None:
            texts += [made.decode(), made.decode()[:-1], made.decode() + rng.choice(alphabet)]
            whole += 1
    assert whole
    for text in texts:
        assert accepts(constraint, text) == bool(theirs.fullmatch(text)), text


GRAMMAR = r"""
# an expression of numbers
root  ::= term ((" + " | " - ") term)*   # no left recursion
term  ::= number | "(" root ")"
        | name{1,2}
number ::= "-"? ([0-9] | [1-9] [0-9]{1,3}) ("." [0-9]+)?
name ::= [a-z_\u00e9] [^ ()+\x2d\n]*
"""


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("1", True),
        ("-12.5 + (a - 3)", True),
        ("éx + y", True),
        ("(((7)))", True),
        ("1 +", False),
        ("12345", False),
        ("01", False),
        ("(1", False),
        ("a-b", False),
    ],
)
def test_grammars_in_gbnf(text: str, good: bool, single: TokenTexts) -> None:
    assert accepts(Constraint(Grammar("grammar", GRAMMAR), single), text) == good


def test_rules_that_end_with_themselves_have_no_depth(single: TokenTexts) -> None:
    source = 'root ::= item rest\nrest ::= "," item rest | ""\nitem ::= [0-9]\n'
    assert accepts(Constraint(Grammar("grammar", source), single), "1" + ",2" * 2000)
    nested = Constraint(Grammar("grammar", 'root ::= "(" root ")" | "x"'), single)
    assert accepts(nested, "(" * 200 + "x" + ")" * 200)
    assert not accepts(nested, "(" * 300 + "x" + ")" * 300)  # the depth is bounded


REFUSED = {
    "regex": {
        "(?=a)b": "lookahead",
        "(?<!a)b": "lookbehind",
        "(a)\\1": "back reference",
        "\\bword": "word boundary",
        "\\p{L}": "Unicode property",
        "a{5,2}": "first is larger",
        "a{9999999}": "more than",
        "(a": "without '\\)'",
        "a)": "without '\\('",
        "[a": "without '\\]'",
        "*a": "nothing before it",
        "a**": "quantifier after",
        "a^b": "anchor within",
        "[[:alpha:]]": "named class",
        "[z-a]": "not in order",
        "\\q": "escape that is not known",
        "\\xZZ": "without its digits",
        "(" * 300 + ")" * 300: "nests too deep",
        "a{,2}": "'\\{,'",
    },
    "grammar": {
        'a ::= "x"': "no rule 'root'",
        "root ::= b": "'b' is used and not defined",
        'root ::= root "a" | "b"': "'root' begins with itself",
        'root ::= a\na ::= b? a "x" | "y"\nb ::= "z"': "'a' begins with itself",
        'root ::= "a': "without its end",
        'root ::= "a" ; b': "';'",
        'root ::= ("a"': "without '\\)'",
        'root ::= "a"\nroot ::= "b"': "second rule",
        "root = a": "without '::='",
        'root ::= "a" root': "no text matches",
    },
    "json_schema": {
        '{"patternProperties": {}}': "'patternProperties'",
        '{"type": "array", "uniqueItems": true}': "'uniqueItems'",
        '{"multipleOf": 3}': "'multipleOf'",
        '{"not": {}}': "'not'",
        '{"if": {}, "then": {}}': "'if'",
        '{"properties": {"a": {"x-mine": 1}}}': "'x-mine'",
        '{"type": "string", "format": "hostname"}': "format 'hostname'",
        '{"type": "text"}': "'type' must be",
        '{"minimum": "3"}': "'minimum' must be",
        '{"minLength": -1}': "'minLength' must be",
        '{"pattern": "(?=a)"}': "lookahead",
        '{"$ref": "#"}': "leads to itself",
        '{"$ref": "#/$defs/none"}': "leads nowhere",
        '{"$ref": "http://example.org/x"}': "is not supported",
        '{"properties": {"a": {"$id": "b"}}}': "'\\$id' within",
        '{"enum": []}': "no text matches",
        '{"type": "integer", "minimum": 3, "maximum": 2}': "no text matches",
        '{"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}': "no text",
        '{"anyOf": [{"$ref": "#"}]}': "leads to itself",
        '{"oneOf": [{"type": "number"}, {"type": "integer"}]}': "'oneOf'",
        '{"items": [{}]}': "'prefixItems'",
        '{"a": 1, "a": 2}': "twice",
        '{"type": ': "not one JSON value",
        "7": "must be an object",
        "[" * 200 + "]" * 200: "nests deeper",
    },
}


@pytest.mark.parametrize(
    ("kind", "source"), [(kind, source) for kind, all_ in REFUSED.items() for source in all_]
)
def test_what_is_not_supported_is_refused_by_name(kind: str, source: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[kind][source]) as caught:
        Grammar(kind, source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


HOSTILE: list[tuple[str, str]] = [
    ("regex", "(a|a)*" * 60 + "b"),
    ("regex", "(a*)*" * 100),
    ("regex", "(.*a){30}"),
    ("regex", "((a{1,99}){1,99}){1,99}"),
    ("regex", "(x+x+)+y"),
    ("regex", "(a|b)*a(a|b){200}"),
    ("regex", "[a-z]{1000000}"),
    ("regex", "a" * 200_000),
    ("grammar", 'root ::= "a" root root | "a"'),
    ("grammar", 'root ::= "(" root ")" root | "[" root "]" root | "x"'),
    ("grammar", "root ::= " + " | ".join(f'"{"a" * n}"' for n in range(1, 400))),
    (
        "grammar",
        "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60)) + '\nr60 ::= "a"\nroot ::= r0',
    ),
    (
        "json_schema",
        json.dumps({"anyOf": [{"type": "string", "minLength": n} for n in range(500)]}),
    ),
    ("json_schema", json.dumps({"properties": {f"p{n}": {"type": "string"} for n in range(3000)}})),
    (
        "json_schema",
        json.dumps({"type": "string", "pattern": "(a|b)*a(a|b){20}", "maxLength": 5000}),
    ),
    ("json_schema", json.dumps({"enum": ["a" * n for n in range(1, 500)]})),
    (
        "json_schema",
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    f"d{n}": {
                        "allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 2}"}]
                    }
                    for n in range(60)
                }
                | {"d60": True, "d61": {"type": "array", "items": {"$ref": "#/$defs/d0"}}},
            }
        ),
    ),
    ("json_schema", '{"type": "number", "minimum": 1e999999}'),
    ("json_schema", '{"type": "number", "minimum": -1e300, "maximum": 1e300}'),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_sources_cost_little_or_are_refused(number: int, usual: TokenTexts) -> None:
    """That this test ends at all is what it is about."""
    kind, source = HOSTILE[number]
    rng = random.Random(number)
    try:
        constraint = Constraint(Grammar(kind, source), usual)  # type: ignore[arg-type]
        for _ in range(60):
            allowed = np.flatnonzero(constraint.allowed())
            if allowed.size == 0 or (token := int(rng.choice(allowed))) == END:
                break
            constraint.advance(token)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - it may also do well
