"""The Jinja environment that transformers renders chat templates in, and the marking of tokens.

Imported only when a chat template is rendered, as the rest of the tokenizer needs no Jinja.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pocketslm.runtime.tokenizer.metering import Metered, MeteredEnvironment, check_json
from pocketslm.runtime.tokenizer.vocabulary import any_of


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant said for training: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """`namespace()` without access to underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # so that `namespace(self=...)` works
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may be long


class _Dict:
    """`dict()` with no way to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the underscored name {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML characters; prompts have to keep them."""
    check_json(value, indent, separators, ensure_ascii)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> MeteredEnvironment:
    """A fresh environment with the settings, filters and globals of transformers."""
    engine = MeteredEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    engine.filters["tojson"] = _to_json
    engine.globals["raise_exception"] = _raise_exception
    engine.globals["strftime_now"] = _strftime_now
    engine.globals["dict"] = _Dict()
    engine.globals["namespace"] = _Namespace
    return engine


def mark_special_tokens(
    engine: Environment, tree: nodes.Template, marks: Mapping[str, str]
) -> nodes.Template:
    """`tree` with every special token that it writes replaced by its mark.

    `marks` maps a token's text to its mark. Tokens are found inside literals, and around a role
    that stands between two literals.
    """
    if marks:
        engine.filters["mark_role"] = lambda role, left, right: marks.get(
            f"{left}{role}{right}", f"{left}{role}{right}"
        )
        _Marker(marks).visit(tree)  # in place: the root itself is kept
    return tree


def compiled(source: str, marks: Mapping[str, str]) -> Template:
    """The template with its special tokens marked and its steps counted."""
    engine = environment()
    tree = mark_special_tokens(engine, engine.parse(source), marks)
    Metered().visit(tree)
    tree.set_environment(engine)
    return engine.from_string(tree)


class _Marker(NodeTransformer):
    def __init__(self, marks: Mapping[str, str]) -> None:
        self._marks = marks
        self._special = any_of(marks)
        self._heads = {text[:end] for text in marks for end in range(1, len(text))}
        self._tails = {text[start:] for text in marks for start in range(1, len(text))}

    def _mark(self, text: str) -> str:
        assert self._special is not None
        return self._special.sub(lambda match: self._marks[match.group()], text)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._mark(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        value = self._mark(node.value) if isinstance(node.value, str) else node.value
        return nodes.Const(value, lineno=node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = self._around_roles(node.nodes)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node.nodes = self._around_roles(node.nodes)
        return self.generic_visit(node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        operands = [node.right]
        left = node.left
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        operands.append(left)
        visited = [self.visit(operand) for operand in self._around_roles(operands[::-1])]
        chain: nodes.Expr = visited[0]
        for operand in visited[1:]:
            chain = nodes.Add(chain, operand, lineno=node.lineno)
        return chain

    def _around_roles(self, operands: list[nodes.Expr]) -> list[nodes.Expr]:
        """`'..<|', role, '|>..'` becomes `'..', role | mark_role('<|', '|>'), '..'`."""
        out = list(operands)
        for at in range(1, len(out) - 1):
            left, right = _literal(out[at - 1]), _literal(out[at + 1])
            if left is None or right is None or not _is_role(out[at]):
                continue
            head = next((left[i:] for i in range(len(left)) if left[i:] in self._heads), "")
            ends = range(len(right), 0, -1)
            tail = next((right[:end] for end in ends if right[:end] in self._tails), "")
            if head and tail:
                lineno = out[at].lineno
                around = [nodes.TemplateData(text, lineno=lineno) for text in (head, tail)]
                out[at - 1] = _literal_like(out[at - 1], left[: len(left) - len(head)])
                out[at + 1] = _literal_like(out[at + 1], right[len(tail) :])
                out[at] = nodes.Filter(out[at], "mark_role", around, [], None, None, lineno=lineno)
        return out


def _literal(node: nodes.Expr) -> str | None:
    if isinstance(node, nodes.TemplateData):
        return node.data
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None


def _literal_like(node: nodes.Expr, text: str) -> nodes.Expr:
    return type(node)(text, lineno=node.lineno)


def _is_role(node: nodes.Expr) -> bool:
    """Whether `node` is `role`, `message.role` or `message['role']`."""
    if isinstance(node, nodes.Name):
        return bool(node.name == "role")
    if isinstance(node, nodes.Getattr):
        return bool(node.attr == "role")
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "role"
    )
