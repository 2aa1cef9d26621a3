"""The measurement: one row of every table, with all that is needed to judge or repeat it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.profiling.machine import Machine

SCHEMA = 1
OURS = "pocketslm"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One test of one artefact by one runtime.

    A test times either a prompt of ``n_prompt`` tokens in one call on an empty cache (pp), or
    ``n_gen`` greedy single-token steps (tg) after ``n_depth`` tokens are in the cache; the other
    count is 0. With ``n_depth`` 0 the first step runs the first token of the sequence.

    run: the same for all rows of one call of ``bench``; their samples of equal index were taken
    right after each other. started: UTC, ISO 8601. model: the bundle's name, in its peers' rows
    too; artefact: the name of the file or folder that was run; artefact_sha256: of the manifest
    of a bundle, else of the artefact's files. runtime: "pocketslm" or a peer's name; backend:
    what computes. context: tokens that the KV cache was made for. samples_ns: every counted
    repetition; step_ns: every decode step of them, in order. load_ns: from the artefact's path to
    a session ready to run, files in the page cache, imports and hash checks not counted.
    base_rss_bytes: the worker's peak before it loaded (interpreter and libraries), which
    peak_rss_bytes includes. quality: as the bundle's manifest has it.
    """

    run: str
    started: str
    pocketslm: str
    machine: Machine
    software: dict[str, str]
    model: str
    artefact: str
    artefact_sha256: str
    size_bytes: int
    runtime: str
    runtime_version: str
    backend: str
    threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    context: int
    samples_ns: tuple[int, ...]
    step_ns: tuple[int, ...]
    load_ns: int
    base_rss_bytes: int
    peak_rss_bytes: int
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    quality: dict[str, Any] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise UsageError(
                f"the measurement has schema {self.schema!r}, this pocketslm reads {SCHEMA}; "
                "measure again or use the version that wrote it"
            )
        for field in fields(self):
            if field.type == "str" and not isinstance(getattr(self, field.name), str):
                raise UsageError(f"{field.name} is {getattr(self, field.name)!r}, expected a text")
        for name in ("size_bytes", "n_prompt", "n_gen", "n_depth", "base_rss_bytes"):
            _require(name, getattr(self, name), 0)
        for name in ("threads", "context", "load_ns", "peak_rss_bytes"):
            _require(name, getattr(self, name), 1)
        for name in ("rss_anon_bytes", "rss_file_bytes"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), 0)
        for name in ("samples_ns", "step_ns"):
            for value in getattr(self, name):
                _require(name, value, 1)
        if (self.n_prompt == 0) == (self.n_gen == 0):
            raise UsageError(
                f"n_prompt is {self.n_prompt} and n_gen {self.n_gen}, expected just one of them "
                "above 0: a row is one test"
            )
        if not self.samples_ns:
            raise UsageError("samples_ns is empty, expected at least one repetition")
        if len(self.step_ns) != self.n_gen * len(self.samples_ns):
            raise UsageError(
                f"step_ns has {len(self.step_ns)} values, expected n_gen x repetitions = "
                f"{self.n_gen} x {len(self.samples_ns)}"
            )

    @property
    def test(self) -> str:
        """llama-bench's name of the test: ``pp512``, ``tg128``, ``tg128 @ d512``."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Of each repetition."""
        tokens = self.n_prompt or self.n_gen
        return tuple(tokens * 1e9 / sample for sample in self.samples_ns)

    def summary(self) -> dict[str, float]:
        """What tables show, under llama-bench's names where it has one.

        avg, median and stddev (of a sample, 0 for a single repetition) are over repetitions. The
        percentiles are latencies: of single decode steps, or of whole prompts (the time to the
        first token), where five repetitions make p99 the slowest one.
        """
        speeds = self.tokens_per_second
        latencies = self.step_ns or self.samples_ns
        return {
            "avg_ns": statistics.fmean(self.samples_ns),
            "stddev_ns": _stddev(self.samples_ns),
            "avg_ts": statistics.fmean(speeds),
            "stddev_ts": _stddev(speeds),
            "median_ts": statistics.median(speeds),
            "p50_ns": percentile(latencies, 50),
            "p90_ns": percentile(latencies, 90),
            "p99_ns": percentile(latencies, 99),
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field, then ``test`` and ``summary``, which follow from them."""
        return asdict(self) | {"test": self.test, "summary": self.summary()}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Strict: UsageError for anything missing, unknown or of the wrong kind."""
        data = {name: value for name, value in data.items() if name not in ("test", "summary")}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UsageError(f"the measurement has unknown fields {unknown}")
        try:
            data["machine"] = Machine(**data["machine"])
            data["samples_ns"] = tuple(data["samples_ns"])
            data["step_ns"] = tuple(data["step_ns"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise UsageError(f"the measurement does not follow the schema: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read one line that :meth:`to_json` wrote; UsageError where it is not one."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"not a measurement but {text[:80]!r}: {error}") from None
        if not isinstance(data, dict):
            raise UsageError(f"not a measurement but {text[:80]!r}, expected a JSON object")
        return cls.from_dict(data)


def percentile(values: Sequence[int], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _stddev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _require(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}, expected an integer of at least {least}")
