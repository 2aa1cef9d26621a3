"""A budget for chat templates: steps, and the length of what they make.

A template is a program that came with a model, and sixty bytes of it can ask for hours or for all
memory. So a rendering may take so many steps, and make texts of so many characters, for each
character that went in; it stops at the first thing that asks for more, before that is made.

Steps are counted where a template repeats itself: in the bodies of loops, macros and blocks
(`Metered` writes the count into the parsed template), in filters and in calls. Whatever makes,
copies, compares or prints a value first says how large it is. The few filters of Jinja whose cost
cannot be told from their arguments are left out: no chat template needs them.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from operator import index
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer

STEPS, STEPS_PER_CHARACTER = 2_000_000, 16
LENGTH, LENGTH_PER_CHARACTER = 1_000_000, 16
CHARACTERS_PER_STEP = 32  # to make or to compare
MAX_DEPTH = 64  # of lists in lists
MAX_BITS = 16_384  # of a whole number, about as many as Python prints
MAX_WIDTH = 999  # of a field in a format
MAX_INDENT = 64

_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_SHALLOW = {  # filters that do not look into what they are given
    *("attr", "count", "d", "default", "first", "items", "last", "length", "map", "random"),
    *("reject", "rejectattr", "select", "selectattr"),
}
_COMPARING = {
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le"),
    *("lessthan", "lower", "lt", "ne", "upper"),
}
_REFUSED_METHODS = ("encode", "to_bytes", "from_bytes")  # bytes are no text
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class OverBudget(Exception):
    """What a template asked for too much of."""


class Meter:
    """What is left for one rendering of `size` characters of input."""

    def __init__(self, size: int) -> None:
        self.steps = STEPS + STEPS_PER_CHARACTER * size
        self.longest = LENGTH + LENGTH_PER_CHARACTER * size

    def spend(self, steps: int) -> None:
        """Take steps from the budget."""
        self.steps -= steps
        if self.steps < 0:
            raise OverBudget("steps")

    def fits(self, characters: int) -> None:
        """Take what it costs to make a text or list of this length."""
        if characters > self.longest:
            raise OverBudget("characters")
        self.spend(characters // CHARACTERS_PER_STEP)

    def weigh(self, value: object) -> int:
        """At most how many characters `str(value)` has; takes what it costs to go through it."""
        if isinstance(value, str):
            self.spend(1 + len(value) // CHARACTERS_PER_STEP)
            return len(value)
        total, stack = 0, [(value, 0)]
        while stack:
            item, depth = stack.pop()
            self.spend(1)
            if isinstance(item, str):
                self.spend(len(item) // CHARACTERS_PER_STEP)
                total += 2 + (2 if item.isprintable() else 10) * len(item)
                continue
            if isinstance(item, range):  # what is no number is looked for in all of it
                self.spend(len(item))
            total += item.bit_length() // 3 + 2 if isinstance(item, int) else 64
            children = _children(item)
            if children is None:
                continue
            if depth == MAX_DEPTH:
                raise OverBudget("nested lists")
            self.spend(len(children))
            total += 4 * len(children)
            stack += [(child, depth + 1) for child in children]
        return total

    def each(self, values: Iterable[Any], price: int = 1) -> Iterator[Any]:
        """The values, so many steps each."""
        for value in values:
            self.spend(price)
            yield value

    def join(self, parts: Iterable[str]) -> str:
        """The text of parts that are made one after the other."""
        out, length = [], 0
        for part in parts:
            length += len(part)
            if length > self.longest:
                raise OverBudget("characters")
            out.append(part)
        return "".join(out)


_current: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def metered(size: int) -> Iterator[None]:
    """Everything inside has the budget of `size` characters of input."""
    token = _current.set(Meter(size))
    try:
        yield
    finally:
        _current.reset(token)


def size_of(value: object) -> int:
    """The size of plain data, in characters."""
    if isinstance(value, str):
        return 16 + len(value)
    children = _children(value)
    return 16 + sum(map(size_of, children or ()))


def _children(value: object) -> list[Any] | None:
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple, set, frozenset, _ITEMS, _VALUES, _KEYS)):
        return list(value)
    return None


_EMPTY: dict[Any, Any] = {}
_KEYS, _VALUES, _ITEMS = type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items())


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a price for each operation; it works inside `metered` only."""

    intercepted_binops = frozenset({"+", "-", "*", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_finalize)
        self.concat = lambda parts: _current.get().join(parts)  # type: ignore[method-assign]
        self.globals.pop("lipsum")
        self.filters = {
            name: _filter(name, filter_)
            for name, filter_ in FILTERS.items()
            if name not in _LEFT_OUT
        } | {
            "$weigh": _weighed,
            "$each": _each,
            "$copy": _copied,
            "$join": _joined,
            "$spend": _spend,
        }
        self.tests = {
            name: _weighing(cast("Any", test)) if name in _COMPARING else test
            for name, test in TESTS.items()
        }

    def call_binop(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        meter = _current.get()
        if sign == "*":
            _check_product(meter, left, right)
        elif sign == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > MAX_BITS:
                raise OverBudget("digits")
        elif sign == "%" and isinstance(left, str):
            _check_percent(meter, left, right)
        elif sign == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            meter.fits(_length(left) + 6 * _length(right))
        elif sign == "-" and isinstance(left, (set, _KEYS, _ITEMS)):
            meter.weigh(left)
            meter.weigh(right)
        return super().call_binop(context, sign, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _current.get().weigh(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_ = super().wrap_str_format(value)
        if format_ is None:
            return None
        pattern: str = value.__self__

        @functools.wraps(format_)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(_current.get(), pattern, (args, kwargs))
            return format_(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _current.get()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(meter.each(args[0])),)
        meter.spend(len(args) + len(kwargs))
        if not isinstance(__obj, (Macro, LoopContext, type)):
            sizes = [meter.weigh(argument) for argument in (*args, *kwargs.values())]
            _check_method(meter, owner, name, args, kwargs, sum(sizes))
        return super().call(__context, __obj, *args, **kwargs)


def _check_method(
    meter: Meter, owner: object, name: str, args: Any, kwargs: Any, given: int
) -> None:
    """Refuses a method of a text, number or list whose result would not fit."""
    if isinstance(owner, (str, int)) and name in _REFUSED_METHODS:
        raise SecurityError(f"{name}() is not for chat templates")
    if isinstance(owner, (list, tuple, dict)):
        meter.spend(len(owner) if name == "copy" else 1)
        if name in ("count", "index"):
            meter.weigh(owner)
    if not isinstance(owner, str) or name in ("format", "format_map"):
        return
    size = 3 * len(owner)  # some letters have a longer upper case
    numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, int)]
    if name in ("center", "ljust", "rjust", "zfill"):
        size += max(numbers, default=0)
    elif name == "expandtabs":
        size += owner.count("\t") * max(numbers, default=8)
    elif name == "replace" and len(args) >= 2 and all(isinstance(a, str) for a in args[:2]):
        size += _replaced(owner, *args[:2])
    elif name == "join":
        size = given + len(owner) * len(args[0])
    elif name == "translate":
        size *= 1 + given
    meter.fits(size)


def _replaced(text: str, old: str, new: str) -> int:
    return (text.count(old) if old else len(text) + 1) * len(new)


def _length(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise OverBudget("digits")
        return
    many, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(times, int):
        meter.fits(_length(many) * max(times, 0))


def _check_percent(meter: Meter, pattern: str, values: object) -> None:
    given, size = meter.weigh(values), len(pattern)
    for match in _PERCENT.finditer(pattern):
        _check_widths(match.groups(""))
        size += given + 2 * MAX_WIDTH
    meter.fits(size)


def _check_format(meter: Meter, pattern: str, values: object) -> None:
    given, size = meter.weigh(values), len(pattern)
    for _, field, spec, _ in string.Formatter().parse(pattern):
        if field is None:
            continue
        if "{" in (spec or ""):
            raise SecurityError("a width is written out, not taken from a value")
        _check_widths(re.findall(r"\d+", spec or ""))
        size += given + 2 * MAX_WIDTH
    meter.fits(size)


def _check_widths(widths: Iterable[str]) -> None:
    for width in widths:
        if width == "*":
            raise SecurityError("a width is written out, not taken from a value")
        if len(width) > len(str(MAX_WIDTH)):
            raise OverBudget("columns")


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """A value as it is printed."""
    meter = _current.get()
    meter.fits(meter.weigh(value))
    return value


@pass_context
def _spend(context: Any, steps: int) -> None:
    _current.get().spend(steps)


@pass_context
def _weighed(context: Any, value: Any) -> Any:
    _current.get().weigh(value)
    return value


@pass_context
def _each(context: Any, values: Iterable[Any], price: int) -> Iterator[Any]:
    return _current.get().each(values, price)


@pass_context
def _copied(context: Any, value: Any) -> Any:
    _current.get().fits(_length(value))
    return value


@pass_context
def _joined(context: Any, values: list[Any]) -> str:
    meter = _current.get()
    meter.fits(sum(map(meter.weigh, values)))
    return "".join(map(str, values))


def _weighing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def weighed(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            _current.get().weigh(argument)
        return function(*args, **kwargs)

    return weighed


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that says first what it takes."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment
    check = _CHECKS.get(name, _times(3))  # some letters have a longer upper case

    @functools.wraps(function)
    def priced(*args: Any, **kwargs: Any) -> Any:
        meter = _current.get()
        head, (value, *rest) = args[:skipped], args[skipped:]
        meter.spend(1)
        if name not in _SHALLOW:
            if isinstance(value, Iterator):
                value = list(meter.each(value))
            size = meter.weigh(value)
            for argument in (*rest, *kwargs.values()):
                meter.weigh(argument)
            check(meter, value, size, *rest, **kwargs)
        result = function(*head, value, *rest, **kwargs)
        return meter.each(result) if isinstance(result, Iterator) else result

    return priced


def _times(factor: int) -> Callable[..., None]:
    """The price of a filter whose result is at most so many times as long."""
    return lambda meter, given, size, *_, **__: meter.fits(factor * size)


def _batch(meter: Meter, given: Any, size: int, count: Any, fill: Any = None, **_: Any) -> None:
    meter.spend(_length(given))
    if fill is not None:
        meter.fits(index(count))


def _slice(meter: Meter, given: Any, size: int, slices: Any, fill: Any = None, **_: Any) -> None:
    meter.spend(_length(given) + index(slices))


def _center(meter: Meter, given: Any, size: int, width: int = 80) -> None:
    meter.fits(size + index(width))


def _indent(meter: Meter, given: Any, size: int, width: Any = 4, *_: Any, **__: Any) -> None:
    step = len(width) if isinstance(width, str) else index(width)
    meter.fits(size + (str(given).count("\n") + 2) * step)


def _replace(meter: Meter, given: Any, size: int, old: Any, new: Any, *_: Any, **__: Any) -> None:
    meter.fits(6 * size + 6 * _replaced(str(given), str(old), str(new)))


def _format(meter: Meter, given: Any, size: int, *args: Any, **kwargs: Any) -> None:
    _check_percent(meter, str(given), (args, kwargs))


def _join(meter: Meter, given: Any, size: int, between: Any = "", *_: Any, **__: Any) -> None:
    meter.fits(size + _length(given) * len(str(between)))


def _round(meter: Meter, given: Any, size: int, precision: Any = 0, *_: Any, **__: Any) -> None:
    if abs(index(precision)) > MAX_WIDTH:
        raise OverBudget("digits")


def _sum(meter: Meter, given: Any, size: int, *args: Any, **kwargs: Any) -> None:
    start = kwargs.get("start", args[1] if len(args) > 1 else 0)
    if not isinstance(start, (int, float)):  # lists are copied again for each one added
        meter.fits(size)
        meter.spend(_length(given) * size // CHARACTERS_PER_STEP)


def _sort(meter: Meter, given: Any, size: int, *_: Any, **__: Any) -> None:
    meter.spend(16 * size // CHARACTERS_PER_STEP + 16 * _length(given))


_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sum": _sum,
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _sort),
    **dict.fromkeys(("list", "reverse"), lambda meter, given, size: meter.spend(_length(given))),
    **dict.fromkeys(("e", "escape", "forceescape"), _times(6)),
    "urlencode": _times(12),
    "string": lambda meter, given, size: meter.fits(size),
}


def check_json(value: Any, indent: Any, separators: Any, ensure_ascii: bool) -> None:
    """Refuses what would be too long as JSON."""
    meter = _current.get()
    between = sum(map(len, separators)) if separators else 4
    if isinstance(indent, str):
        indent = len(indent)
    step = index(indent or 0)
    if max(step, between) > MAX_INDENT:
        raise OverBudget("columns")
    size = meter.weigh(value) * (12 if ensure_ascii else 6)
    meter.fits(size + _places(value) * (between + step + 2))


def _places(value: object, depth: int = 1) -> int:
    """How many steps of indentation a value has, all lines together."""
    children = _children(value)
    return depth + sum(_places(child, depth + 1) for child in children or ())


class Metered(NodeTransformer):
    """Writes into a parsed template what its repetitions and comparisons cost."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        price = sum(map(_price, node.body))
        count = _applied("$spend", nodes.Const(1 + price), node)
        node.body = [nodes.ExprStmt(count, lineno=node.lineno), *node.body]
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:  # what it leaves out never reaches the body
            price = nodes.Const(1 + _price(node.test))
            node.iter = _applied("$each", node.iter, node)
            node.iter.args.append(price)
        self._body(node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        holders: list[Any] = [node, *node.ops]
        for holder in holders:
            if not isinstance(holder.expr, nodes.Const):
                holder.expr = _applied("$weigh", holder.expr, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _applied("$join", nodes.List(node.nodes, lineno=node.lineno), node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _applied("$copy", node.node, node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _applied("$weigh", node.key, node)
        return node


def _applied(name: str, value: Any, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=node.lineno)


def _price(node: nodes.Node) -> int:
    """The parts of a statement, each counted once; calls and long literals count more."""
    inside = sum(map(_price, node.iter_child_nodes()))
    own = 4 if isinstance(node, (nodes.Filter, nodes.Call, nodes.Test)) else 1
    return own + inside + len(getattr(node, "data", "")) // CHARACTERS_PER_STEP
