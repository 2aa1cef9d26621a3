"""Predict memory and speed of the catalog's models on a device, before anything is exported.

The prediction is a roofline. A decoded token reads the weights and the keys and values before it,
so its time is those bytes over the bandwidth. A prompt multiplies, so its time is its
multiply-accumulates over the int8 peak. :class:`Reached` holds the measured share that a program
reaches of either.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError, UsageError
from pocketslm.models.catalog import catalog
from pocketslm.profiling.cost import Cost
from pocketslm.profiling.machine import Limits, limits, this_machine
from pocketslm.profiling.records import OURS, Measurement, read_records
from pocketslm.profiling.tables import md_table
from pocketslm.runtime.backends import usable_cores

MOST_SHARE = 1.0
KV_BYTES = 2  # fp16, the default of the native graph
_BYTES = {"MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS = {
    "ram": _BYTES,
    "bandwidth": {f"{unit}/s": size for unit, size in _BYTES.items()},
    "int8": {"GMAC/s": 1e9, "TMAC/s": 1e12},
}
_EXAMPLES = {"ram": "4GB", "bandwidth": "30GB/s", "int8": "300GMAC/s"}


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, in bits including their group's scale. The head is stored as the
    embedding.

    - ``resident_bits``: the part of the head's bits that lies in memory. A greedy step reads the
      high nibbles of an int8 head, and the low ones of few rows.
    - ``integer``: whether prompts are multiplied in int8.
    """

    name: str
    layer_bits: float
    head_bits: float
    resident_bits: float
    integer: bool = True

    def weight_bytes(self, cost: Cost) -> float:
        """Bytes of the file."""
        tables = cost.embedding_values * (1 if cost.tied else 2)
        return (cost.layer_macs * self.layer_bits + tables * self.head_bits) / 8

    def read_bytes(self, cost: Cost) -> float:
        """Bytes of weights that one token reads."""
        return (cost.layer_macs * self.layer_bits + cost.head_macs * self.head_bits) / 8

    def resident_bytes(self, cost: Cost) -> float:
        """Bytes of weights that lie in memory. Of an embedding apart, few rows do."""
        return (cost.layer_macs * self.layer_bits + cost.head_macs * self.resident_bits) / 8


# As `export` stores float weights: an fp16 scale, or scale and minimum, for every 32 weights, the
# head and embedding in int8.
SCHEMES = (
    Scheme("int4 g32 sym", 4.5, 8.5, 4.5),
    Scheme("int4 g32 min", 5, 8.5, 4.5),
    Scheme("int8 g32 sym", 8.5, 8.5, 4.5),
    Scheme("fp16", 16, 16, 16, integer=False),
)
# Files that people bring may also have a head of fewer bits.
BROUGHT = (*SCHEMES, Scheme("int4 g32 sym, head too", 4.5, 4.5, 4.5))


@dataclass(frozen=True)
class Reached:
    """The part of a machine's limits that a program reaches.

    - ``decode``: the share of the bandwidth.
    - ``prefill``: the share of the int8 peak.
    - ``fixed_bytes``: peak memory beside weights, keys and values: Python, and the engine's own.

    The defaults are what the native backend reached in Python on one thread of an AMD EPYC (Zen 4)
    with models of 135M and 360M parameters, docs/how-to/fit-a-budget.md.
    """

    decode: float = 0.8
    prefill: float = 0.45
    fixed_bytes: float = 19e6


@dataclass(frozen=True)
class Prediction:
    """The prediction for one model. ``prefill_tps`` is None if its prompts do not run in int8."""

    model: str
    scheme: str
    size_bytes: int
    ram_bytes: int
    fits: bool
    prefill_tps: float | None
    decode_tps: float


@dataclass(frozen=True)
class Check:
    """A measured row beside its prediction, which comes from the rows of the other models.

    ``unit`` is "t/s" or "MB". ``error`` is predicted / measured - 1.
    """

    model: str
    scheme: str
    test: str
    unit: str
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True)
class Device:
    """The device of a prediction, and the source of its figures."""

    ram_bytes: float
    limits: Limits
    reached: Reached
    source: str


def quantity(name: str, text: str) -> float:
    """``4GB``, ``30GB/s``, ``300GMAC/s`` in bytes, bytes a second, multiply-accumulates a second.

    UsageError names the units of ``name``: ram, bandwidth or int8.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z/]+)", text.strip())
    if match is None or match[2] not in _UNITS[name] or not float(match[1]):
        raise UsageError(
            f"--{name} is {text!r}, expected a number above 0 with one of "
            f"{', '.join(_UNITS[name])}, such as {_EXAMPLES[name]}"
        )
    return float(match[1]) * _UNITS[name][match[2]]


def device(
    ram: str | None = None,
    bandwidth: str | None = None,
    int8: str | None = None,
    records: Sequence[Measurement] = (),
    threads: int | None = None,
) -> Device:
    """The device as stated, else as recorded, else this machine, measured now."""
    if (bandwidth is None) != (int8 is None):
        raise UsageError("one of --bandwidth and --int8 is missing, expected both or neither")
    if records and len({(r.machine.cpu, r.machine.product) for r in records}) > 1:
        raise UsageError("the records are of several machines, expected those of one")
    used = _usable(records, threads)
    reached, source = _reached(used), "stated"
    found: Limits | None
    ram_bytes = None if ram is None else quantity("ram", ram)
    if bandwidth is not None and int8 is not None:
        found = Limits(quantity("bandwidth", bandwidth), quantity("int8", int8))
    elif records:
        found, source = _limits(used), f"recorded (-t {used[0].threads})"
    else:
        threads = threads or usable_cores()
        found, source = limits(threads, None), f"measured here (-t {threads})"
        if found is None:
            raise BackendError(
                "the native operators do not run here, expected --bandwidth and --int8 or --records"
            )
        ram_bytes = ram_bytes or this_machine().ram_bytes
    if ram_bytes is None and records:
        ram_bytes = records[0].machine.ram_bytes
    if ram_bytes is None:
        raise UsageError("--ram is missing, expected one such as 4GB beside a stated device")
    return Device(ram_bytes, found, reached, source)


def predict(device: Device, context: int, prompt: int) -> list[Prediction]:
    """Predict every catalog model in every scheme, ordered by size, for so long a context and
    prompt.

    The context is at most the model's own. Raises UsageError for less than 1.
    """
    if min(context, prompt) < 1:
        raise UsageError(f"context is {context} and prompt {prompt}, expected at least 1")
    found = []
    for name, cost, most in _models():
        length = min(context, most)
        for scheme in SCHEMES:
            ram = _ram(cost, scheme, length, device.reached)
            tps = _prefill(cost, min(prompt, most), device.limits, device.reached)
            found.append(
                Prediction(
                    model=name,
                    scheme=scheme.name,
                    size_bytes=round(scheme.weight_bytes(cost)),
                    ram_bytes=round(ram),
                    fits=ram <= device.ram_bytes,
                    prefill_tps=tps if scheme.integer else None,
                    decode_tps=_decode(cost, scheme, length, device.limits, device.reached),
                )
            )
    return sorted(found, key=lambda one: one.size_bytes)


def check(records: Sequence[Measurement], threads: int | None = None) -> list[Check]:
    """Each measured row beside its prediction, which never saw a row of the same model."""
    checks = []
    rows = _usable(records, threads)
    for row in rows:
        name, cost = _model(row)
        reached = _reached([other for other in rows if _model(other)[0] != name])
        scheme = _scheme(row, cost)
        assert row.limits is not None
        figures: list[tuple[str, float, float]] = []
        if row.decode_tps:
            depth = _mean_depth(row)
            predicted = _decode(cost, scheme, depth, row.limits, reached)
            figures.append(("t/s", predicted, statistics.median(row.decode_tps)))
        elif scheme.integer:
            predicted = _prefill(cost, row.n_prompt, row.limits, reached)
            figures.append(("t/s", predicted, statistics.median(row.prefill_tps)))
        if row.peak_rss_bytes and row.context:
            ram = _ram(cost, scheme, row.context, reached)
            figures.append(("MB", ram / 1e6, row.peak_rss_bytes / 1e6))
        checks += [
            Check(name, scheme.name, row.test, unit, predicted, measured, predicted / measured - 1)
            for unit, predicted, measured in figures
        ]
    return checks


def fit(
    ram: str | None,
    bandwidth: str | None,
    int8: str | None,
    records: str | Path | None,
    threads: int | None,
    context: int,
    prompt: int,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[Device, list[Prediction], list[Check]]:
    """The output of ``pocketslm fit``. ``say`` is called with readings that are impossible."""
    rows = [] if records is None else possible(read_records(records), say)
    if records is not None and not rows:
        raise UsageError(f"{records} holds no row that can be; measure again with `bench --record`")
    target = device(ram, bandwidth, int8, rows, threads)
    return target, predict(target, context, prompt), check(rows, threads) if rows else []


def possible(
    rows: Sequence[Measurement], say: Callable[[str], None] = lambda message: None
) -> list[Measurement]:
    """Drop impossible rows, after measuring the limits again if they were taken on this machine.

    Nothing reads faster than memory. A share above 1 means that the limits were measured while the
    machine was busy or slow. Rows that still exceed them, and rows of another machine, are dropped.
    """
    here = this_machine()
    measured: dict[tuple[int, int | None], Limits | None] = {}
    kept = []
    for row in rows:
        share = _greatest_share(row)
        if share <= MOST_SHARE:
            kept.append(row)
            continue
        what = f"{row.model} {row.test} (-t {row.threads}) reached {share:.0%} of its limits"
        if (row.machine.cpu, row.machine.product) == (here.cpu, here.product):
            key = row.threads, row.bytes_per_token
            if key not in measured:
                measured[key] = limits(*key)
            again = _greater(row.limits, measured[key])
            row = replace(row, limits=again)
            if (share := _greatest_share(row)) <= MOST_SHARE:
                say(f"{what}, which cannot be: measured again, it is {share:.0%}")
                kept.append(row)
                continue
            what += f", measured again {share:.0%}"
        say(f"{what}, which cannot be: left out; measure again with `bench --record`")
    return kept


def _greatest_share(row: Measurement) -> float:
    """The share of its own limits that a row reaches, or 0 if the row has no limits."""
    if not _tells(row):
        return 0.0
    return max(_reached_decode(row) or 0.0, _reached_prefill(row) or 0.0)


def _greater(one: Limits | None, other: Limits | None) -> Limits | None:
    if one is None or other is None:
        return one or other
    return Limits(*map(max, astuple(one), astuple(other)))


def format_fit(target: Device, predictions: Sequence[Prediction], checks: Sequence[Check]) -> str:
    """Markdown."""
    speed, peak = target.limits.bandwidth_bytes_s / 1e9, target.limits.int8_macs_s / 1e9
    text = (
        f"RAM {target.ram_bytes / 1e9:.1f} GB; {target.source}: bandwidth {speed:.1f} GB/s, int8 "
        f"{peak:.0f} GMAC/s; reached: {target.reached.decode:.0%} of the bandwidth, "
        f"{target.reached.prefill:.0%} of the peak, "
        f"{target.reached.fixed_bytes / 1e6:.0f} MB beside weights and cache\n\n"
    )
    text += md_table(
        ["model", "scheme", "size", "RAM", "fits", "prefill t/s", "decode t/s"],
        ["l", "l", "r", "r", "l", "r", "r"],
        [
            [
                one.model,
                one.scheme,
                f"{one.size_bytes / 1e6:.0f} MB",
                f"{one.ram_bytes / 1e6:.0f} MB",
                "yes" if one.fits else "no",
                "" if one.prefill_tps is None else f"{one.prefill_tps:.1f}",
                f"{one.decode_tps:.1f}",
            ]
            for one in predictions
        ],
    )
    if not checks:
        return text
    return f"{text}\n" + md_table(
        ["measured model", "scheme", "test", "predicted", "measured", "error"],
        ["l", "l", "r", "r", "r", "r"],
        [
            [
                one.model,
                one.scheme,
                one.test,
                f"{one.predicted:.1f} {one.unit}",
                f"{one.measured:.1f} {one.unit}",
                f"{one.error:+.0%}",
            ]
            for one in checks
        ],
    )


def fit_dict(
    target: Device, predictions: Sequence[Prediction], checks: Sequence[Check]
) -> dict[str, Any]:
    return {
        "device": asdict(target),
        "predictions": [asdict(one) for one in predictions],
        "checks": [asdict(one) for one in checks],
    }


def _decode(cost: Cost, scheme: Scheme, depth: float, limits: Limits, reached: Reached) -> float:
    read = scheme.read_bytes(cost) + cost.kv_bytes_read(depth, KV_BYTES)
    return limits.bandwidth_bytes_s * reached.decode / read


def _prefill(cost: Cost, tokens: int, limits: Limits, reached: Reached) -> float:
    return limits.int8_macs_s * reached.prefill * tokens / cost.prompt_macs(tokens)


def _ram(cost: Cost, scheme: Scheme, context: int, reached: Reached) -> float:
    cache = cost.kv_bytes(context, KV_BYTES)
    return scheme.resident_bytes(cost) + cache + reached.fixed_bytes


@cache
def _models() -> list[tuple[str, Cost, int]]:
    """The catalog's models: name, cost, longest context."""
    return [
        (name, Cost.of(config), config.max_position_embeddings)
        for name, entry in catalog().items()
        if (config := entry.config) is not None
    ]


def _model(row: Measurement) -> tuple[str, Cost]:
    """The catalog model of a row, found by its dimensions, since a bundle may have any name."""
    for name, cost, _ in _models():
        if (row.macs_per_token, row.head_macs) == (cost.layer_macs, cost.head_macs):
            return name, cost
    raise LookupError(row.model)


def _scheme(row: Measurement, cost: Cost) -> Scheme:
    assert row.bytes_per_token
    read = row.bytes_per_token
    return min(BROUGHT, key=lambda one: abs(math.log(one.read_bytes(cost) / read)))


def _usable(records: Sequence[Measurement], threads: int | None) -> list[Measurement]:
    """Rows of catalog models on the native backend with so many threads, or with the most."""
    rows = [row for row in records if _tells(row)]
    if threads is None:
        threads = max((row.threads for row in rows), default=None)
    rows = [row for row in rows if row.threads == threads]
    if records and not rows:
        raise UsageError(
            "the records hold no native row of a catalog model"
            + ("" if threads is None else f" with {threads} threads")
            + ", expected some of `pocketslm bench --backend native --record`"
        )
    return rows


def _tells(row: Measurement) -> bool:
    """Whether a row says how far a catalog model came on the native backend."""
    known = {(cost.layer_macs, cost.head_macs) for _, cost, _ in _models()}
    return bool(
        row.runtime == OURS
        and row.parallel == 1
        and row.backend.startswith("native")
        and row.limits is not None
        and row.bytes_per_token
        and (row.macs_per_token, row.head_macs) in known
    )


def _limits(rows: Sequence[Measurement]) -> Limits:
    found = [row.limits for row in rows if row.limits is not None]
    return Limits(
        statistics.median(one.bandwidth_bytes_s for one in found),
        statistics.median(one.int8_macs_s for one in found),
    )


def _mean_depth(row: Measurement) -> float:
    """Tokens in the cache before a decoded one, on average."""
    return row.n_prompt + row.n_depth + (row.n_gen - 1) / 2


def _reached(rows: Sequence[Measurement]) -> Reached:
    """The median share that rows reach of their own limits, or the default if no row has limits."""
    default = Reached()
    return Reached(
        _median(rows, _reached_decode, default.decode),
        _median(rows, _reached_prefill, default.prefill),
        _median(rows, _fixed_bytes, default.fixed_bytes),
    )


def _median(
    rows: Sequence[Measurement], of: Callable[[Measurement], float | None], default: float
) -> float:
    found = [value for row in rows if (value := of(row)) is not None]
    return statistics.median(found) if found else default


def _reached_decode(row: Measurement) -> float | None:
    if not row.decode_tps or row.limits is None or row.bytes_per_token is None:
        return None
    _, cost = _model(row)
    read = row.bytes_per_token + cost.kv_bytes_read(_mean_depth(row), KV_BYTES)
    return statistics.median(row.decode_tps) * read / row.limits.bandwidth_bytes_s


def _reached_prefill(row: Measurement) -> float | None:
    if not row.prefill_tps or row.limits is None:
        return None
    _, cost = _model(row)
    macs = cost.prompt_macs(row.n_prompt) / row.n_prompt
    return statistics.median(row.prefill_tps) * macs / row.limits.int8_macs_s


def _fixed_bytes(row: Measurement) -> float | None:
    if row.peak_rss_bytes is None or row.context is None or row.bytes_per_token is None:
        return None
    _, cost = _model(row)
    weights = _scheme(row, cost).resident_bytes(cost)
    return row.peak_rss_bytes - weights - cost.kv_bytes(row.context, KV_BYTES)
