"""Measurements as text: Markdown in llama-bench's manner, JSON, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.profiling.records import OURS, Measurement
from pocketslm.terminal import printable

SPEED = "t/s, median (min .. max)"
ANSWERS = ("what", "prompt", "answer", "TTFT", "input, t/s", "output, t/s", "total")


@dataclass(frozen=True)
class Ratio:
    """Our tokens/s as a multiple of a peer's, on one test.

    - ``peer``: its artefact and runtime.
    - ``median``: the ratio of our median tokens/s to the peer's.
    - ``low``, ``high``: the extreme ratios of repetitions that were taken right after each other.
    """

    test: str
    threads: int
    peer: str
    median: float
    low: float
    high: float


def format_rows(rows: Sequence[Measurement], style: str = "md") -> str:
    """All rows as text that ends in a newline; styles: md, json, jsonl, csv.

    ``md`` shows medians with the slowest and the fastest repetition and, if peers were measured,
    our ratios to their medians below. The others carry every field and sample.
    """
    if style not in FORMATS:
        raise UsageError(
            f"output format {style!r} is unknown, expected one of: {', '.join(FORMATS)}"
        )
    return FORMATS[style](rows)


def artefact_names(rows: Sequence[Measurement]) -> list[str]:
    """A name for each row's artefact: its file name. If several artefacts share that name, the
    beginning of the SHA-256 follows, or else the size.
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.artefact, set()).add(_content(row))
    return [
        row.artefact if len(found[row.artefact]) == 1 else f"{row.artefact} ({_content(row)[:8]})"
        for row in rows
    ]


def _content(row: Measurement) -> str:
    return row.artefact_sha256 or f"{row.size_bytes} bytes"


def ratios(rows: Sequence[Measurement]) -> list[Ratio]:
    """Our ratios to each peer, for the tests of one run that both did."""
    ours = {_test_key(row): row for row in rows if row.runtime == OURS}
    return [
        _ratio(ours[_test_key(row)], row, name)
        for row, name in zip(rows, artefact_names(rows), strict=True)
        if row.runtime != OURS and _test_key(row) in ours
    ]


def _test_key(row: Measurement) -> tuple[str, str, int]:
    return row.run, row.title, row.threads


def _ratio(ours: Measurement, peer: Measurement, name: str) -> Ratio:
    # Where one was cut short, the other has more repetitions.
    each = [a / b for a, b in zip(ours.tokens_per_second, peer.tokens_per_second, strict=False)]
    median = statistics.median(ours.tokens_per_second) / statistics.median(peer.tokens_per_second)
    return Ratio(
        ours.title, ours.threads, f"{name} on {_engine(peer)}", median, min(each), max(each)
    )


def _md(rows: Sequence[Measurement]) -> str:
    names = artefact_names(rows)
    table = md_table(
        ["model", "size", "backend", "threads", "test", SPEED, "peak RSS", "load"],
        ["l", "r", "l", "r", "r", "r", "r", "r"],
        [_md_row(row, name) for row, name in zip(rows, names, strict=True)],
    )
    tables = [table]
    if answered := answers(rows):
        setups = [[*setup, *figures] for setup, figures in answered]
        tables.append(
            md_table(["model", "backend", "threads", *ANSWERS], ["l", "l", *"rlrrrrrr"], setups)
        )
    if together := _together(rows):
        tables.append(
            md_table(
                ["model", "backend", "threads", "test", "t/s", "of one", "a token, p50", "p99"],
                ["l", "l", "r", "r", "r", "r", "r", "r"],
                together,
            )
        )
    if timed := [(row, name) for row, name in zip(rows, names, strict=True) if row.operator_ns]:
        tables.append(
            md_table(
                ["model", "backend", "threads", "test", "of the time"],
                ["l", "l", "r", "r", "l"],
                [
                    [name, _engine(row), str(row.threads), row.title, _shares(row)]
                    for row, name in timed
                ],
            )
        )
    if compared := ratios(rows):
        tables.append(
            md_table(
                ["ours against", "threads", "test", "ratio", "min .. max of rounds"],
                ["l", "r", "r", "r", "r"],
                [
                    [
                        r.peer,
                        str(r.threads),
                        r.test,
                        f"{r.median:.2f}",
                        f"{r.low:.2f} .. {r.high:.2f}",
                    ]
                    for r in compared
                ],
            )
        )
    return "\n".join(tables)


def answers(rows: Sequence[Measurement]) -> list[tuple[tuple[str, str, str], list[str]]]:
    """The columns ANSWERS for prompts with answers, as SlimLM prints them
    (https://arxiv.org/abs/2411.09944), with artefact, engine and threads.

    Figures are medians over repetitions. The prompts of one task are added up, except for the time
    to its first token.
    """
    tasks: dict[tuple[tuple[str, str, str], tuple[str, ...]], list[Measurement]] = {}
    for row, name in zip(rows, artefact_names(rows), strict=True):
        if row.n_prompt and row.n_gen:
            setup = name, _engine(row), str(row.threads)
            task = row.test if row.workload == "random" else row.workload
            tasks.setdefault((setup, (row.run, row.machine.cpu, task)), []).append(row)
    return [(setup, _answer(group)) for (setup, _), group in tasks.items()]


def _together(rows: Sequence[Measurement]) -> list[list[str]]:
    """Speed and the time between two tokens of a text, of tests with several texts at once and of
    the same with one."""

    def same(row: Measurement) -> tuple[object, ...]:
        return row.run, row.artefact, row.runtime, row.backend, row.threads, row.n_gen, row.n_depth

    several = {same(row) for row in rows if row.parallel > 1}
    ones = {same(row): row for row in rows if row.parallel == 1 and same(row) in several}
    cells = []
    for row, name in zip(rows, artefact_names(rows), strict=True):
        if row.n_prompt or same(row) not in several:
            continue
        one = ones.get(same(row))
        speed, summary = statistics.median(row.tokens_per_second), row.summary()
        gain = "" if one is None else f"{speed / statistics.median(one.tokens_per_second):.2f}"
        times = [f"{summary[name] / 1e6:.1f} ms" for name in ("p50_ns", "p99_ns")]
        cells.append(
            [name, _engine(row), str(row.threads), row.title, f"{speed:.1f}", gain, *times]
        )
    return cells


def _answer(rows: Sequence[Measurement]) -> list[str]:
    prompt, new = sum(row.n_prompt for row in rows), sum(row.n_gen for row in rows)
    prefill = sum(statistics.median(row.prefill_ns) for row in rows) / 1e9
    decode = sum(row.n_gen / statistics.median(row.decode_tps) for row in rows)
    total = sum(statistics.median(row.samples_ns) for row in rows) / 1e9
    several = f", {len(rows)} prompts" if len(rows) > 1 else ""
    return [
        ("random tokens" if rows[0].workload == "random" else rows[0].workload) + several,
        str(prompt),
        str(new),
        f"{statistics.median(rows[0].prefill_ns) / 1e6:.0f} ms",
        f"{prompt / prefill:.1f}",
        f"{new / decode:.1f}",
        f"{total:.2f} s",
    ]


def _shares(row: Measurement) -> str:
    """Operators by their share of the time. Those below a hundredth are added up."""
    times = row.operator_ns or {}
    total = sum(times.values()) or 1
    order = sorted(times, key=lambda name: -times[name])
    great = [name for name in order if times[name] >= total / 100]
    small = sum(times[name] for name in order if name not in great)
    named = [f"{name} {times[name] / total:.0%}" for name in great]
    return ", ".join(named + [f"others {small / total:.0%}"] * (small > total / 200))


def speed_cell(row: Measurement, digits: int = 2) -> str:
    """The column SPEED."""
    speeds = row.tokens_per_second
    middle = f"{statistics.median(speeds):.{digits}f}"
    if len(speeds) == 1:
        return middle
    return f"{middle} ({min(speeds):.{digits}f} .. {max(speeds):.{digits}f})"


def _md_row(row: Measurement, name: str) -> list[str]:
    return [
        name,
        f"{row.size_bytes / 1e6:.1f} MB",
        _engine(row),
        str(row.threads),
        row.title,
        speed_cell(row),
        "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.0f} MB",
        "" if row.load_ns is None else f"{row.load_ns / 1e6:.0f} ms",
    ]


def _engine(row: Measurement) -> str:
    return f"{row.runtime} {row.runtime_version} ({row.backend})"


def md_table(head: list[str], sides: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with cells of equal width, so that it also reads well as plain text."""
    lines = [[printable(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines = [
        [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, side, width in zip(line, sides, widths, strict=True)
        ]
        for line in lines
    ]
    rule = [
        "-" * (width - 1) + (":" if side == "r" else "-")
        for side, width in zip(sides, widths, strict=True)
    ]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _json(rows: Sequence[Measurement]) -> str:
    return json.dumps([row.to_dict() for row in rows], indent=2) + "\n"


def _jsonl(rows: Sequence[Measurement]) -> str:
    return "".join(row.to_json() + "\n" for row in rows)


def _csv(rows: Sequence[Measurement]) -> str:
    """One column for each field. ``machine`` and ``summary`` are spread out, lists and maps are
    JSON.
    """
    if not rows:
        return ""
    flat = [_flat(row) for row in rows]
    columns = list({name: None for row in flat for name in row})
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Measurement) -> dict[str, Any]:
    data = row.to_dict()
    machine, summary = data.pop("machine"), data.pop("summary")
    return {
        name: json.dumps(value) if isinstance(value, dict | list | tuple) else value
        for name, value in (data | machine | summary).items()
    }


FORMATS = {"md": _md, "json": _json, "jsonl": _jsonl, "csv": _csv}
