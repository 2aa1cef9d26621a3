"""Turn records into one page: self-contained HTML with charts, or Markdown, or CSV.

The page has a section only if rows hold its data. Rows of one setup and test, even from several
runs, are one point: the median of all their repetitions.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.folders import written
from pocketslm.profiling import charts
from pocketslm.profiling.charts import Axis, Bar, Point, Series, clean
from pocketslm.profiling.llama_bench import read_rows
from pocketslm.profiling.records import Measurement, TracePoint, percentile
from pocketslm.profiling.tables import (
    ANSWERS,
    FORMATS,
    answers,
    artefact_names,
    format_rows,
    ratios,
    speed_cell,
)

SUFFIXES = (".html", ".svg", *(f".{style}" for style in FORMATS))

_STYLE = (
    charts.STYLE + "*{box-sizing:border-box}body{margin:0 auto;padding:2rem 1.2rem 4rem;"
    "max-width:60rem;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}"
    "h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .2rem}"
    "h3{font-size:1rem;margin:1.4rem 0 .2rem}p,figcaption{color:var(--soft);margin:.2rem 0 .8rem}"
    "figure{margin:0;overflow-x:auto}figure svg{display:block;width:100%;min-width:36rem}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.86rem}"
    "td,th{padding:.34rem .6rem;text-align:right;white-space:nowrap;"
    "border-bottom:1px solid var(--faint);font-variant-numeric:tabular-nums}"
    "th{color:var(--soft);font-weight:500}td.name,th.name{text-align:left}"
    "th.group{text-align:left;color:var(--ink);font-weight:600;padding-top:1rem;white-space:normal}"
    "th i{display:inline-block;width:.7rem;height:.7rem;border-radius:50%;margin-right:.5rem}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}"
    "dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}"
    "@media print{h2{break-after:avoid}figure,tr{break-inside:avoid}}"
)


@dataclass(frozen=True)
class _Setup:
    """One artefact in one runtime on one device. It has one colour."""

    artefact: str
    engine: str
    threads: int
    device: str


@dataclass(frozen=True)
class _Group:
    name: str
    colour: int


class _Rows:
    """The rows by setup. Each setup has a short name and a colour on the whole page."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.all = rows
        self.by_setup: dict[_Setup, list[Measurement]] = {}
        self._artefacts = {
            id(row): name for row, name in zip(rows, artefact_names(rows), strict=True)
        }
        for row in rows:
            self.by_setup.setdefault(self.setup(row), []).append(row)
        self.setups = list(self.by_setup)
        self.devices = list(dict.fromkeys(setup.device for setup in self.setups))
        several_threads = len({setup.threads for setup in self.setups}) > 1
        self.names = {
            setup: ", ".join(
                [f"{setup.artefact} · {setup.engine}"]
                + [f"{setup.threads} threads"] * several_threads
                + [setup.device] * (len(self.devices) > 1)
            )
            for setup in self.setups
        }

    def setup(self, row: Measurement) -> _Setup:
        """The setup of a row. Different artefacts with one file name are different setups."""
        engine = f"{row.runtime} {row.runtime_version} ({row.backend})"
        device = str(row.machine.product or row.machine.cpu)
        return _Setup(self._artefacts[id(row)], engine, row.threads, device)

    def colour(self, setup: _Setup) -> int:
        return self.setups.index(setup)

    def curves(
        self,
        at: Callable[[Measurement], float | None],
        values: Callable[[Measurement], Iterable[float]],
    ) -> list[Series]:
        """One line for each setup: the median over all repetitions, with their extremes."""
        curves = []
        for setup, rows in self.by_setup.items():
            found: dict[float, list[float]] = {}
            for row in rows:
                if (place := at(row)) is not None:
                    found.setdefault(place, []).extend(values(row))
            points = [(place, statistics.median(ys)) for place, ys in sorted(found.items())]
            spans = [(min(ys), max(ys)) for _, ys in sorted(found.items())]
            if points:
                curves.append(Series(self.names[setup], points, self.colour(setup), spans=spans))
        return curves


def write_report(sources: Sequence[str | Path], output: Path) -> int:
    """Read records (ours or llama-bench's) and write the report that the suffix of ``output``
    names; ``.svg`` gives the first device's roofline alone. Returns the number of rows. Raises
    UsageError, and then writes nothing.
    """
    if output.suffix not in SUFFIXES:
        raise UsageError(
            f"{output} ends in {output.suffix!r}, expected one of: {', '.join(SUFFIXES)}"
        )
    rows = [row for source in sources for row in read_rows(source)]
    if not rows:
        raise UsageError("there are no records, expected files of `bench --record FILE.jsonl`")
    if output.suffix == ".html":
        text = html(rows)
    elif output.suffix == ".svg":
        text = roofline(rows)
    else:
        text = format_rows(rows, output.suffix[1:])
    try:
        with written(output) as part:
            part.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"cannot write the report {output}: {error}") from None
    return len(rows)


def html(rows: Sequence[Measurement]) -> str:
    """The page; it refers to nothing outside itself."""
    data = _Rows(rows)
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    days = sorted({row.started[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    count = f"{len(rows)} measurement{'s' * (len(rows) > 1)}"
    sections = (
        _summary,
        _answers,
        _speed,
        _operators,
        _roofline,
        _memory,
        _trace,
        _pareto,
        _energy,
        _devices,
    )
    body = "".join(section(data) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{clean(models)} measured</title><style>{_STYLE}</style></head><body>"
        f"<h1>{clean(models)}</h1><p>{clean(f'{count}, {when}')}</p>{body}</body></html>\n"
    )


def roofline(rows: Sequence[Measurement]) -> str:
    """The first device's roofline as an SVG file. Raises UsageError if no row has its limits."""
    data = _Rows(rows)
    found = next(filter(None, (_roofline_chart(data, device) for device in data.devices)), None)
    if found is None:
        raise UsageError("no record has the limits of its device, which `bench` measures")
    return charts.standalone(found)


def _summary(data: _Rows) -> str:
    head = ["test", "tokens/s", "TTFT p50", "step p50", "p90", "p99", "peak RSS", "load"]
    groups = []
    for setup, rows in data.by_setup.items():
        cells = []
        for row in rows:
            summary = row.summary()
            step = [percentile(row.step_ns, p) / 1e6 for p in (50, 90, 99)] if row.step_ns else []
            ttft = f"{summary['ttft_ns_p50'] / 1e6:.1f} ms" if row.ttft_ns else ""
            cells.append(
                [row.title + (" cold" if row.cold else "")]
                + [speed_cell(row, 1), ttft]
                + ([f"{ms:.2f} ms" for ms in step] or [""] * 3)
                + [_mb(row.peak_rss_bytes), "" if row.load_ns is None else _ms(row.load_ns)]
            )
        size = f"{data.names[setup]}, {rows[0].size_bytes / 1e6:.1f} MB"
        groups.append((_Group(size, data.colour(setup)), cells))
    body = _table(head, groups)
    against = [
        [r.peer, str(r.threads), r.test, f"{r.median:.2f}", f"{r.low:.2f} .. {r.high:.2f}"]
        for r in ratios(data.all)
    ]
    if against:
        body += "<h3>Ours against</h3>" + _table(
            ["peer", "threads", "test", "times as fast", "lowest .. highest of rounds"],
            [(None, against)],
        )
    return _section(
        "Summary",
        "Medians, with the slowest and the fastest repetition; latencies are of single decode "
        "steps.",
        body,
    )


def _answers(data: _Rows) -> str:
    groups = []
    for setup, rows in data.by_setup.items():
        if found := answers(rows):
            group = _Group(data.names[setup], data.colour(setup))
            groups.append((group, [cells for _, cells in found]))
    if not groups:
        return ""
    return _section(
        "Prompts with answers",
        "Medians. The prompts of one task count together, TTFT is that of its first one.",
        _table(ANSWERS, groups),
    )


def _operators(data: _Rows) -> str:
    """A chart for the rows of each runtime: their operators have different names."""
    engines: dict[str, list[Measurement]] = {}
    for row in data.all:
        if row.operator_ns and sum(row.operator_ns.values()):
            engine = f"{row.runtime}, {row.backend.partition(' ')[0]}"
            engines.setdefault(engine, []).append(row)
    text = ""
    for engine, rows in engines.items():
        heading = f"<h3>{clean(engine)}</h3>" if len(engines) > 1 else ""
        text += heading + _figure(_operators_chart(data, rows))
    return text and _section(
        "Operators",
        "Shares of the time of one repetition, which is not among those counted elsewhere; beside "
        "each bar the sum. Norms and quantization count to the product that they feed.",
        text,
    )


def _operators_chart(data: _Rows, rows: Sequence[Measurement]) -> str:
    """Operators beyond the number of colours are counted together."""
    each = [(row, row.operator_ns or {}, sum((row.operator_ns or {}).values())) for row in rows]
    shares: Counter[str] = Counter()
    for _, times, total in each:
        shares.update({name: ns / total for name, ns in times.items()})
    names = [name for name, _ in shares.most_common(charts.COLOURS - 1)]
    bars = []
    for row, times, total in each:
        parts = [(times.get(name, 0) / total, colour) for colour, name in enumerate(names)]
        parts.append((1 - sum(share for share, _ in parts), len(names)))
        label = f"{data.names[data.setup(row)]}, {row.title}"
        bars.append(Bar(label, parts, f"{total / 1e6:.1f} ms"))
    others = ["others"] * (len(shares) > len(names))
    return charts.bars(bars, "Time by operator", [*names, *others])


def _speed(data: _Rows) -> str:
    decode = data.curves(
        lambda row: row.n_depth if row.n_gen and not row.n_prompt and row.parallel == 1 else None,
        lambda row: row.decode_tps,
    )
    prefill = data.curves(_prompt, lambda row: row.prefill_tps)
    ttft = data.curves(_prompt, lambda row: [ns / 1e6 for ns in row.ttft_ns])
    lengths = sorted({x for one in prefill for x, _ in one.points})
    prompt = Axis("prompt, tokens", log=True, ticks=_apart(lengths))
    note = "Medians; the pale bars reach from the slowest to the fastest repetition."
    text = ""
    if decode:
        depth = Axis("tokens in the cache before", ticks=_apart([x for x, _ in _longest(decode)]))
        chart = charts.plot(decode, depth, Axis("decode, tokens/s"), "Decode speed by depth")
        text += _section("Decoding", note, _figure(chart))
    if prefill:
        speed = Axis("prefill, tokens/s")
        text += _section(
            "Prefill", note, _figure(charts.plot(prefill, prompt, speed, "Prefill by prompt"))
        )
        time = Axis("TTFT, ms", log=True)
        text += _section(
            "Time to the first token", note, _figure(charts.plot(ttft, prompt, time, "TTFT"))
        )
    return text


def _prompt(row: Measurement) -> float | None:
    """The length of a prompt, if it is part of a sweep and not the prompt of a document."""
    return row.n_prompt if row.n_prompt and row.workload == "random" else None


def _roofline(data: _Rows) -> str:
    text = ""
    for device in data.devices:
        if chart := _roofline_chart(data, device):
            heading = f"<h3>{clean(device)}</h3>" if len(data.devices) > 1 else ""
            text += heading + _figure(chart)
    return text and _section(
        "Roofline",
        "The line is what this device can do, measured on it: memory reads at the left, int8 "
        "arithmetic at the right. A point near it has little left to gain. Weights only: attention "
        "and the cache are left out; a peer's bytes are its file's where nothing else is known.",
        text,
    )


def _roofline_chart(data: _Rows, device: str) -> str:
    """Empty if no row of the device has its limits."""
    setups = [setup for setup in data.setups if setup.device == device]
    roofs: dict[int, list[Point]] = {}
    for setup in setups:
        for row in data.by_setup[setup]:
            roof = row.limits and (row.limits.bandwidth_bytes_s, row.limits.int8_macs_s)
            if roof and all(0 < _finite(limit) < charts.HUGE for limit in roof):
                roofs.setdefault(setup.threads, []).append(roof)
    dots = [_dots(data, setup) for setup in setups if setup.threads in roofs]
    dots = [one for one in dots if one.points]
    if not dots:
        return ""
    xs = [x for one in dots for x, _ in one.points]
    lines = [_roof(threads, found, min(xs), max(xs)) for threads, found in roofs.items()]
    return charts.plot(
        [*lines, *dots],
        Axis("multiply-accumulates per byte of weights", log=True),
        Axis("10⁹ multiply-accumulates/s", log=True),
        f"Roofline of {device}",
    )


def _roof(threads: int, found: Sequence[Point], low: float, high: float) -> Series:
    bandwidth, peak = (statistics.median(values) for values in zip(*found, strict=True))
    ridge = peak / bandwidth
    xs = sorted({min(low, ridge) / 1.5, ridge, max(high, ridge) * 1.5})
    points = [(x, min(bandwidth * x, peak) / 1e9) for x in xs]
    plural = "s" * (threads > 1)
    name = f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GMAC/s ({threads} thread{plural})"
    return Series(name, points, None, marks=False, dashed=True)


def _dots(data: _Rows, setup: _Setup) -> Series:
    """For each test, multiply-accumulates per byte of weights and per second."""
    found: dict[str, list[Point]] = {}
    for row in data.by_setup[setup]:
        weights = row.bytes_per_token or row.size_bytes
        if row.macs_per_token is None or not weights or (row.n_prompt and row.n_gen):
            continue
        head = (row.head_macs or 0) * row.parallel
        work = row.macs_per_token * (row.n_prompt or row.parallel) + head
        seconds = statistics.median(row.samples_ns) / 1e9 / (row.n_gen or 1)
        found.setdefault(row.title, []).append((work / weights, work / seconds / 1e9))
    points = [
        (statistics.median(x for x, _ in each), statistics.median(y for _, y in each))
        for each in found.values()
    ]
    return Series(data.names[setup], points, data.colour(setup), line=False, labels=list(found))


def _memory(data: _Rows) -> str:
    rows = []
    for setup, mine in data.by_setup.items():
        known = [row for row in mine if row.peak_rss_bytes or row.steady_rss_bytes]
        if not known:
            continue
        row = max(known, key=lambda row: row.peak_rss_bytes or row.steady_rss_bytes or 0)
        parts = [(row.rss_anon_bytes or 0, 0), (row.rss_file_bytes or 0, 1)]
        peak = row.peak_rss_bytes
        text = " · ".join(
            ([f"steady {_mb(row.steady_rss_bytes)}"] if row.steady_rss_bytes else [])
            + ([f"peak {_mb(peak)}"] if peak else [])
        )
        rows.append(Bar(f"{data.names[setup]}, {row.title}", parts, text, peak))
    if not rows:
        return ""
    names = ["own (anonymous)", "of files (weights, libraries)"]
    return _section(
        "Memory",
        "Resident after the test that needed most; the tick is the peak. Pages of files are given "
        "back when the system is short of memory. The interpreter is included where there is one.",
        _figure(charts.bars(rows, "Resident memory", names)),
    )


def _trace(data: _Rows) -> str:
    """Charts only rows that are long enough to tell something: with several points, and not far
    shorter than the others.
    """
    longest = max((row.trace[-1].at_ns for row in data.all if row.trace), default=0)
    rows = [row for row in data.all if row.trace and row.trace[-1].at_ns >= longest / 4]
    sensors: tuple[tuple[str, str, Callable[[TracePoint], object], float], ...] = (
        ("Memory over time", "resident, MB", lambda point: point.rss_bytes, 1e6),
        ("Power", "W", lambda point: point.watts, 1.0),
        ("Temperature", "hottest zone, °C", lambda p: _greatest(p.celsius.values()), 1.0),
        ("Frequency", "fastest cluster, MHz", lambda point: _greatest(point.khz), 1e3),
    )
    text = ""
    for title, label, read, unit in sensors:
        series: list[Series] = []
        for row in rows:
            values = [(point.at_ns / 1e9, _finite(read(point)) / unit) for point in row.trace]
            values = [(at, value) for at, value in values if math.isfinite(value)]
            if len(values) > 2:
                name = f"{data.names[data.setup(row)]}, {row.title}"
                name += " (throttled)" * bool(row.throttled)
                series.append(Series(name, values, len(series), marks=False))
        if series:
            axis = Axis(label, zero=title not in ("Temperature",))
            text += f"<h3>{title}</h3>" + _figure(
                charts.plot(series, Axis("seconds since the first repetition"), axis, title)
            )
    return text and _section("Over time", "As the device's sensors told it during a test.", text)


def _pareto(data: _Rows) -> str:
    """For each setup its size, its fastest decoding and, if measured, its quality."""
    text = ""
    speeds = {
        setup: statistics.median(speeds)
        for setup, rows in data.by_setup.items()
        if (speeds := [s for row in rows if row.parallel == 1 for s in row.decode_tps])
    }
    for quality, label in (("kl", "KL to the source, nats"), ("perplexity", "perplexity")):
        graded: dict[tuple[str, str], tuple[Point, _Setup]] = {}
        for setup in data.setups:
            row = data.by_setup[setup][-1]
            value = _finite((row.quality or {}).get(quality))
            if 0 < value < charts.HUGE:
                place = (row.size_bytes / 1e6, value)
                graded.setdefault((setup.artefact, setup.engine), (place, setup))
        if len(graded) > 1:
            series = [
                Series(
                    data.names[setup],
                    [place],
                    data.colour(setup),
                    line=False,
                    labels=[f"{speeds[setup]:.0f} tok/s"] if setup in speeds else (),
                )
                for place, setup in graded.values()
            ]
            front = charts.front([place for place, _ in graded.values()])
            chart = charts.plot(
                [Series("", front, None, marks=False, dashed=True), *series],
                Axis("size, MB", zero=False),
                Axis(label, log=True),
                "Quality by size",
            )
            text += _section(
                "Quality and size",
                "Further down and further left is better; beside each point its decode speed. "
                "What the dashed line joins, nothing beats in both.",
                _figure(chart),
            )
            break
    if len({setup.artefact for setup in speeds}) > 1:
        series = [
            Series(
                data.names[setup],
                [(data.by_setup[setup][-1].size_bytes / 1e6, speed)],
                data.colour(setup),
                line=False,
            )
            for setup, speed in speeds.items()
        ]
        chart = charts.plot(
            series, Axis("size, MB", zero=False), Axis("decode, tokens/s"), "Speed by size"
        )
        text += _section("Speed and size", "Further up and further left is better.", _figure(chart))
    return text


def _energy(data: _Rows) -> str:
    rows = []
    for row in data.all:
        if row.energy is None or not 0 < _finite(row.energy.joules) < charts.HUGE:
            continue
        setup = data.setup(row)
        joules = row.joules_per_token or 0.0
        text = f"{1e3 * joules:.3g} mJ/token"
        name = f"{data.names[setup]}, {row.title}: {row.energy.label}"
        rows.append(Bar(name, [(joules, data.colour(setup))], text))
    note = "Per token, of the counted repetitions together; each bar says what it includes."
    return _section("Energy", note, _figure(charts.bars(rows, "Energy"))) if rows else ""


def _devices(data: _Rows) -> str:
    text = ""
    for device in data.devices:
        row = next(row for row in data.all if data.setup(row).device == device)
        machine = row.machine
        facts = {
            "processor": " · ".join(filter(None, [machine.cpu, machine.soc])),
            "cores": f"{machine.cores} {machine.arch}" if machine.cores else "",
            "memory": f"{machine.ram_bytes / 2**30:.1f} GiB" if machine.ram_bytes else "",
            "system": machine.os,
            "governor": machine.governor,
            "reached by": machine.kind,
            "software": ", ".join(f"{name} {version}" for name, version in row.software.items()),
        }
        text += f"<h3>{clean(device)}</h3><dl>" + "".join(
            f"<dt>{name}</dt><dd>{clean(str(fact))}</dd>" for name, fact in facts.items() if fact
        )
        text += "</dl>"
    return f"<h2>Devices</h2>{text}"


def _section(title: str, note: str, body: str) -> str:
    return f"<h2>{title}</h2><p>{note}</p>{body}"


def _figure(chart: str) -> str:
    return f"<figure>{chart}</figure>"


def _table(
    head: Sequence[str], groups: Sequence[tuple[_Group | None, Sequence[Sequence[str]]]]
) -> str:
    """A table of groups of rows, each under a name with its colour if it has one."""

    def line(tag: str, cells: Sequence[str]) -> str:
        first, *rest = (clean(cell) for cell in cells)
        others = "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
        return f'<tr><{tag} class="name">{first}</{tag}>{others}</tr>'

    body = ""
    for group, rows in groups:
        if group is not None:
            dot = f'<i style="background:var(--c{group.colour % charts.COLOURS})"></i>'
            body += (
                f'<tr><th class="group" colspan="{len(head)}">{dot}{clean(group.name)}</th></tr>'
            )
        body += "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{line("th", head)}{body}</table></div>'


def _longest(series: Sequence[Series]) -> Sequence[Point]:
    return max((one.points for one in series), key=len)


def _apart(values: Sequence[float]) -> tuple[float, ...]:
    """Put ticks at the measured places if there are few."""
    return tuple(values) if len(values) <= 6 else ()


def _finite(value: Any) -> float:
    """Return NaN for a value that is not a number, since a file may hold anything."""
    return float(value) if isinstance(value, int | float) else math.nan


def _greatest(values: Iterable[Any]) -> float:
    return max((value for value in map(_finite, values) if value < charts.HUGE), default=math.nan)


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.0f} ms"


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"
