"""Charts as SVG text: lines and points on axes, and stacked bars. Pure functions of their data.

Colours are variables of :data:`STYLE`, light or dark as the reader's system asks. Values that are
not finite, or not positive on a logarithmic axis, are left out. Every text is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

Point = tuple[float, float]

WIDTH, PLOT_HEIGHT = 720, 300
LEFT, RIGHT, TOP, BELOW = 66, 18, 14, 52  # margins around the plot
LETTER = 6.3  # mean width of a letter at 12 px, in px
LINE = 18  # px from one line of text to the next
COLOURS = 8
HUGE = 1e30  # no figure; NaN is not below it

_LIGHT = "#2563eb #d9480f #0f8a5f #9333ea #a16207 #0e7490 #be185d #57606a"
_DARK = "#6ea8fe #ff9f68 #4cc79a #c79bff #e3b341 #4fc3d9 #ff8cbf #a8b1bb"


def _variables(page: str, ink: str, soft: str, faint: str, colours: str) -> str:
    series = "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours.split()))
    return f"--page:{page};--ink:{ink};--soft:{soft};--faint:{faint};{series}"


STYLE = (
    ":root{color-scheme:light dark;"
    f"{_variables('#fff', '#1a1f26', '#5b6570', '#e3e7eb', _LIGHT)}}}"
    "@media(prefers-color-scheme:dark){:root{"
    f"{_variables('#14181d', '#e8ebee', '#9aa5b1', '#2c333b', _DARK)}}}}}"
    ".chart text{font:12px system-ui,sans-serif;fill:var(--ink)}"
    ".chart .soft{fill:var(--soft)}.chart .grid{stroke:var(--faint)}"
    ".chart .axis{stroke:var(--soft)}.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".chart .dashed{stroke-dasharray:5 4;stroke-width:1.5}"
    + "".join(f".chart .s{i}{{stroke:var(--c{i})}}" for i in range(COLOURS))
    + "".join(f".chart .f{i}{{fill:var(--c{i})}}" for i in range(COLOURS))
    + ".chart .s{stroke:var(--soft)}.chart .f{fill:var(--soft)}.chart .pale{opacity:.45}"
)


@dataclass(frozen=True)
class Axis:
    """- ``label``: the text, with the unit.
    - ``log``: whether the axis is logarithmic.
    - ``zero``: whether a linear axis begins at 0.
    - ``ticks``: places of ticks; None puts them at round values.
    """

    label: str
    log: bool = False
    zero: bool = True
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    - ``name``: the entry in the legend; empty leaves it out.
    - ``colour``: an index, or None for grey.
    - ``spans``: the lowest and highest y of each point.
    - ``labels``: a text beside each point.
    """

    name: str
    points: Sequence[Point]
    colour: int | None = 0
    line: bool = True
    marks: bool = True
    dashed: bool = False
    spans: Sequence[Point] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Bar:
    """``parts`` are lengths from left to right, each with a colour's index. ``mark`` is a further
    tick.
    """

    label: str
    parts: Sequence[tuple[float, int]]
    text: str
    mark: float | None = None


def plot(series: Sequence[Series], x: Axis, y: Axis, title: str) -> str:
    """An SVG element of all series on common axes. ``title`` is for screen readers."""
    series = [_drawable(one, x, y) for one in series]
    series = [one for one in series if one.points]
    points = [point for one in series for point in one.points]
    heights = [end for one in series for span in one.spans for end in span]
    across = _Scale(x, [px for px, _ in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [py for _, py in points] + heights, TOP + PLOT_HEIGHT, TOP)
    named = [one for one in series if one.name]
    bottom = TOP + PLOT_HEIGHT
    parts = [_grid(across, up, x, y)]
    taken: list[_Box] = [
        _Box(across(px) - 5, up(py) - 5, 10, 10) for px, py in points if len(points) < 80
    ]
    parts += [_draw(one, across, up) for one in series]
    for one in series:
        for (px, py), label in zip(one.points, one.labels, strict=False):
            parts.append(_label(label, across(px), up(py), taken))
    for row, one in enumerate(named):
        parts.append(_legend(one, LEFT, bottom + BELOW + LINE * row + 6))
    return _svg("".join(parts), bottom + BELOW + LINE * len(named) + 2, title)


def bars(rows: Sequence[Bar], title: str, names: Sequence[str] = ()) -> str:
    """Horizontal bars on a common scale from 0. ``names`` are the colours' names in the legend."""
    ends = [sum(length for length, _ in bar.parts) for bar in rows]
    ends += [bar.mark for bar in rows if bar.mark is not None]
    longest = max((end for end in ends if abs(end) < HUGE), default=0.0) or 1.0
    room = WIDTH - RIGHT - 200  # for the figures at the right
    parts, height = [], 4.0
    for bar in rows:
        parts.append(_text(0, height + 12, _cut(bar.label, WIDTH)))
        at = 0.0
        for length, colour in bar.parts:
            width = length / longest * room if 0 < length < HUGE else 0.0
            parts.append(
                f'<rect class="f{colour % COLOURS}" x="{at:.1f}" y="{height + 18:.1f}" '
                f'width="{width:.1f}" height="14" rx="2"/>'
            )
            at += width
        if bar.mark is not None and abs(bar.mark) < HUGE:
            mark = bar.mark / longest * room
            parts.append(_line(mark, height + 15, mark, height + 35, "axis line"))
            at = max(at, mark)
        parts.append(_text(at + 8, height + 29, bar.text, "soft"))
        height += 46
    at = 0.0
    for index, name in enumerate(names):
        width = 18 + LETTER * len(name) + 24
        if at + width > WIDTH:
            at, height = 0.0, height + LINE
        parts.append(
            f'<rect class="f{index % COLOURS}" x="{at:.1f}" y="{height:.1f}" width="12" '
            'height="12" rx="2"/>'
        )
        parts.append(_text(at + 18, height + 10, name))
        at += width
    return _svg("".join(parts), height + (20 if names else 0), title)


def standalone(svg: str) -> str:
    """A chart as a file of its own."""
    body = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, rest = body.split(">", 1)
    page = '<rect x="-12" y="-12" width="100%" height="100%" style="fill:var(--page)"/>'
    return f"{head}><style>{STYLE}</style>{page}{rest}\n"


def clean(text: str) -> str:
    """Escaped, without the characters that XML cannot hold."""
    return escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def number(value: float) -> str:
    """Short: 0.05, 1.5, 120, 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def front(points: Sequence[Point]) -> list[Point]:
    """The points that have no other point below and left of them, from left to right."""
    found: list[Point] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few; low > 0."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    every = [10.0**decade * factor for decade in decades for factor in factors]
    return [tick for tick in every if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


class _Scale:
    """From values to px, with a margin, and the ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.log, self.start, self.end = axis.log, start, end
        low, high = (min(values), max(values)) if values else (1.0, 1.0)
        if axis.log:
            margin = max((high / low) ** 0.06, 1.12)
            self.low, self.high = low / margin, high * margin
            self.ticks = axis.ticks or tuple(log_ticks(self.low, self.high))
        else:
            low = min(low, 0.0) if axis.zero else low - 0.06 * (high - low)
            high = high + 0.06 * (high - low) if high > low else low + (abs(low) or 1.0)
            self.low, self.high = low, high
            self.ticks = axis.ticks or tuple(linear_ticks(low, high))

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    def meets(self, other: _Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def _drawable(one: Series, x: Axis, y: Axis) -> Series:
    """Drop the points that have no place on the axes."""

    def placed(index: int) -> bool:
        values = [*one.points[index], *(one.spans[index] if one.spans else ())]
        logs = [value for value, axis in zip(one.points[index], (x, y), strict=True) if axis.log]
        logs += one.spans[index] if one.spans and y.log else ()
        return all(abs(value) < HUGE for value in values) and all(
            value > 1 / HUGE for value in logs
        )

    kept = [index for index in range(len(one.points)) if placed(index)]
    return replace(
        one,
        points=[one.points[index] for index in kept],
        spans=[one.spans[index] for index in kept] if one.spans else (),
        labels=[one.labels[index] for index in kept] if one.labels else (),
    )


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> str:
    bottom, right = TOP + PLOT_HEIGHT, WIDTH - RIGHT
    parts = []
    for tick in up.ticks:
        parts.append(_line(LEFT, up(tick), right, up(tick), "grid"))
        parts.append(_text(LEFT - 8, up(tick) + 4, number(tick), "soft", "end"))
    for tick in across.ticks:
        parts.append(_line(across(tick), bottom, across(tick), bottom + 5, "axis"))
        parts.append(_text(across(tick), bottom + 19, number(tick), "soft", "middle"))
    parts.append(_line(LEFT, bottom, right, bottom, "axis"))
    parts.append(_text((LEFT + right) / 2, bottom + 38, x.label, "soft", "middle"))
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(
        f'<text class="soft" text-anchor="middle" transform="translate(14 {middle:.0f}) '
        f'rotate(-90)">{clean(y.label)}</text>'
    )
    return "".join(parts)


def _draw(one: Series, across: _Scale, up: _Scale) -> str:
    colour = "" if one.colour is None else str(one.colour % COLOURS)
    parts = []
    for (px, _), (low, high) in zip(one.points, one.spans, strict=False):
        parts.append(_line(across(px), up(low), across(px), up(high), f"line pale s{colour}"))
    if one.line and len(one.points) > 1:
        path = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py in one.points)
        kind = f"line s{colour}" + (" dashed" if one.dashed else "")
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    if one.marks:
        for index, (px, py) in enumerate(one.points):
            names = [one.name, *one.labels[index : index + 1], f"{number(px)}, {number(py)}"]
            title = clean(": ".join(filter(None, names)))
            parts.append(
                f'<circle class="f{colour}" cx="{across(px):.1f}" cy="{up(py):.1f}" r="4">'
                f"<title>{title}</title></circle>"
            )
    return "".join(parts)


def _label(label: str, x: float, y: float, taken: list[_Box]) -> str:
    """A label at the first free place around the point, or none if there is no free place."""
    width = LETTER * len(label)
    places = [(x + side * 8, y + 4 + down, side) for down in (0, -14, 14) for side in (1, -1)]
    for at, base, side in places:
        box = _Box(at if side > 0 else at - width, base - 11, width, 14)
        inside = LEFT <= box.x <= WIDTH - width and 0 <= box.y <= TOP + PLOT_HEIGHT - 14
        if inside and not any(box.meets(other) for other in taken):
            taken.append(box)
            return _text(at, base, label, anchor="start" if side > 0 else "end")
    return ""


def _legend(one: Series, x: float, y: float) -> str:
    colour = "" if one.colour is None else str(one.colour % COLOURS)
    sign = ""
    if one.line:
        kind = f"line s{colour}" + (" dashed" if one.dashed else "")
        sign += _line(x, y, x + 22, y, kind)
    if one.marks:
        sign += f'<circle class="f{colour}" cx="{x + 11}" cy="{y}" r="4"/>'
    return sign + _text(x + 30, y + 4, _cut(one.name, WIDTH - x - 30))


def _cut(text: str, width: float) -> str:
    """Shorten a text to fit. The middle goes, because the ends tell setups apart."""
    room = int(width / LETTER)
    half = (room - 1) // 2
    return text if len(text) <= room else f"{text[:half]}…{text[-half:]}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    looks = f' class="{kind}"' if kind else ""
    looks += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{looks}>{clean(text)}</text>'


def _svg(body: str, height: float, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="-12 -12 {WIDTH + 24} {height + 24:.0f}" role="img" '
        f'aria-label="{clean(title)}">{body}</svg>'
    )
