"""The measurement: one row of a table, with everything needed to judge or repeat it.

Records are files of such rows, one JSON object a line; a run only ever appends to one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pocketslm import schema
from pocketslm.errors import UsageError
from pocketslm.profiling.machine import Limits, Machine

SCHEMA = 2
OURS = "pocketslm"
_AT_LEAST_ONE = (
    "samples_ns",
    "prefill_ns",
    "step_ns",
    "threads",
    "parallel",
    "context",
    "load_ns",
    "peak_rss_bytes",
)


@dataclass(frozen=True)
class Energy:
    """The energy of all counted repetitions together.

    - ``source``: the file or command that told it.
    - ``label``: what it includes, such as "package" or "whole device on battery, idle power
      subtracted".
    """

    joules: float
    source: str
    label: str


@dataclass(frozen=True)
class TracePoint:
    """The sensors at one moment of a row, ``at_ns`` after its first counted repetition began.

    ``celsius`` is by thermal zone, ``khz`` by cluster, in the order of ``Machine.clusters``.
    """

    at_ns: int
    celsius: dict[str, float] = field(default_factory=dict)
    khz: tuple[int, ...] = ()
    rss_bytes: int | None = None
    pss_bytes: int | None = None
    watts: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One test of one artefact by one runtime on one machine. Fields that were not measured are
    None.

    A test times one of three things: a prompt of ``n_prompt`` tokens in one call on an empty cache
    (pp); ``n_gen`` greedy single-token steps (tg) with ``n_depth`` tokens in the cache; or such a
    prompt and then the steps (pp+tg). Counts that do not apply are 0. If ``n_prompt`` and
    ``n_depth`` are 0, the first step runs the first token of the sequence.

    - ``run``: the same for all rows of one call of ``bench``. Their samples of equal index were
      taken right after each other.
    - ``started``: UTC, ISO 8601.
    - ``model``: the bundle's name, in its peers' rows too.
    - ``artefact``: the name of the file or folder that was run.
    - ``artefact_sha256``: the digest of a bundle's manifest, otherwise of the artefact's files.
    - ``runtime``: "pocketslm" or a peer's name. ``backend`` is the part that computes.
    - ``pinning``: the CPUs to which it was bound; empty if it was not.
    - ``context``: the tokens for which the KV cache was made.
    - ``parallel``: texts that were generated at once, each with a cache of its own. ``n_gen``,
      ``n_depth`` and the time of a step are of each text.
    - ``workload``: what the tokens are, such as "random" or "summarize".
    - ``cold``: whether the artefact was dropped from the page cache before it was loaded.

    - ``samples_ns``: every counted repetition.
    - ``prefill_ns``: the prompt's part of each repetition (pp+tg only).
    - ``step_ns``: every decode step in order; empty if steps were not timed apart.
    - ``load_ns``: from the artefact's path to a session ready to run, without imports and hash
      checks.
    - ``base_rss_bytes``: the worker's peak before it loaded (interpreter and libraries).
      ``peak_rss_bytes`` includes it.
    - ``rss_anon_bytes``, ``rss_file_bytes``, ``pss_bytes``, ``pss_file_bytes``: steady, after the
      last repetition.
    - ``cpu_ns``, ``major_faults``: of all counted repetitions together.
    - ``operator_ns``: the time by operator of one more repetition, under the runtime's own names.
    - ``bytes_per_token``: weights read for one token.
    - ``macs_per_token``: multiply-accumulates of one token in the layers, without attention.
    - ``head_macs``: multiply-accumulates in the output head.
    - ``quality``: the quality in the bundle's manifest.
    """

    run: str
    started: str
    pocketslm: str
    machine: Machine
    software: dict[str, str]
    model: str
    artefact: str
    size_bytes: int
    runtime: str
    runtime_version: str
    backend: str
    threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    samples_ns: tuple[int, ...]
    prefill_ns: tuple[int, ...] = ()
    step_ns: tuple[int, ...] = ()
    artefact_sha256: str | None = None
    context: int | None = None
    pinning: tuple[int, ...] = ()
    workload: str = "random"
    cold: bool = False
    load_ns: int | None = None
    base_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    pss_bytes: int | None = None
    pss_file_bytes: int | None = None
    kv_bytes: int | None = None
    cpu_ns: int | None = None
    major_faults: int | None = None
    operator_ns: dict[str, int] | None = None
    energy: Energy | None = None
    trace: tuple[TracePoint, ...] = ()
    throttled: bool | None = None
    parallel: int = 1
    bytes_per_token: int | None = None
    macs_per_token: int | None = None
    head_macs: int | None = None
    limits: Limits | None = None
    quality: dict[str, Any] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for one in fields(self):
            least = int(one.name in _AT_LEAST_ONE)
            value = getattr(self, one.name)
            for count in value if isinstance(value, tuple) else [value]:
                if isinstance(count, int) and count < least:
                    raise UsageError(f"{one.name} is {count}, expected at least {least}")
        if not self.n_prompt and not self.n_gen:
            raise UsageError("n_prompt and n_gen are both 0, expected a test of at least one")
        if self.n_prompt and self.n_depth:
            raise UsageError(
                f"n_prompt is {self.n_prompt} and n_depth {self.n_depth}, expected at most one of "
                "them above 0: a prompt starts an empty cache"
            )
        if self.n_prompt and self.parallel > 1:
            raise UsageError(
                f"n_prompt is {self.n_prompt} and parallel {self.parallel}, expected no prompt: "
                "several texts at once are generated"
            )
        if not self.samples_ns:
            raise UsageError("samples_ns is empty, expected at least one repetition")
        repetitions = len(self.samples_ns)
        if self.step_ns and len(self.step_ns) != self.n_gen * repetitions:
            raise UsageError(
                f"step_ns has {len(self.step_ns)} values, expected n_gen x repetitions = "
                f"{self.n_gen} x {repetitions}"
            )
        both = repetitions if self.n_prompt and self.n_gen else 0
        if len(self.prefill_ns) != both:
            raise UsageError(
                f"prefill_ns has {len(self.prefill_ns)} values, expected {both}: one a repetition "
                "of a prompt with generation, else none"
            )

    @property
    def test(self) -> str:
        """llama-bench's name of the test: ``pp512``, ``tg128 @ d512``, ``pp512+tg128``; of several
        texts at once ``tg128 x4 @ d512``."""
        parts = (("pp", self.n_prompt), ("tg", self.n_gen))
        name = "+".join(f"{kind}{count}" for kind, count in parts if count)
        name += f" x{self.parallel}" if self.parallel > 1 else ""
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def title(self) -> str:
        """The test's name, with its workload unless the tokens are random."""
        return self.test if self.workload == "random" else f"{self.workload} {self.test}"

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Tokens a second of each repetition, of prompt, new tokens and all texts together."""
        tokens = (self.n_prompt + self.n_gen) * self.parallel
        return tuple(tokens * 1e9 / sample for sample in self.samples_ns)

    @property
    def ttft_ns(self) -> tuple[int, ...]:
        """Time to the first token of each repetition; empty without a prompt."""
        return self.prefill_ns or (self.samples_ns if self.n_prompt else ())

    @property
    def prefill_tps(self) -> tuple[float, ...]:
        """Prompt tokens a second of each repetition; empty without a prompt."""
        return tuple(self.n_prompt * 1e9 / ns for ns in self.ttft_ns)

    @property
    def decode_tps(self) -> tuple[float, ...]:
        """New tokens a second of each repetition; empty without generation."""
        if not self.n_gen:
            return ()
        before = self.prefill_ns or (0,) * len(self.samples_ns)
        return tuple(
            self.parallel * self.n_gen * 1e9 / (total - prefill)
            for total, prefill in zip(self.samples_ns, before, strict=True)
        )

    @property
    def steady_rss_bytes(self) -> int | None:
        """Resident after the last repetition."""
        if self.rss_anon_bytes is None or self.rss_file_bytes is None:
            return None
        return self.rss_anon_bytes + self.rss_file_bytes

    @property
    def joules_per_token(self) -> float | None:
        if self.energy is None:
            return None
        tokens = (self.n_prompt + self.n_gen) * self.parallel
        return self.energy.joules / (len(self.samples_ns) * tokens)

    def summary(self) -> dict[str, float]:
        """The figures that tables show, under llama-bench's names as far as it has them.

        avg, median and stddev (of a sample, 0 for a single repetition) are over repetitions. The
        percentiles are latencies: of single decode steps, or of whole prompts (the time to the
        first token), where five repetitions make p99 the slowest one.
        """
        speeds = self.tokens_per_second
        latencies = self.step_ns or self.samples_ns
        summary = {
            "avg_ns": statistics.fmean(self.samples_ns),
            "stddev_ns": _stddev(self.samples_ns),
            "avg_ts": statistics.fmean(speeds),
            "stddev_ts": _stddev(speeds),
            "median_ts": statistics.median(speeds),
            "p50_ns": percentile(latencies, 50),
            "p90_ns": percentile(latencies, 90),
            "p99_ns": percentile(latencies, 99),
        }
        for name, values in (
            ("ttft_ns", self.ttft_ns),
            ("prefill_ts", self.prefill_tps),
            ("decode_ts", self.decode_tps),
        ):
            if values:
                summary |= {f"{name}_p{p}": percentile(values, p) for p in (50, 90, 99)}
        return summary

    def to_dict(self) -> dict[str, Any]:
        """Every field, then ``test`` and ``summary``, which follow from them."""
        return asdict(self) | {"test": self.test, "summary": self.summary()}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Read a row strictly. Raises UsageError for a field that is missing, unknown or of the
        wrong kind.
        """
        data = {name: value for name, value in data.items() if name not in ("test", "summary")}
        _check_schema(data.get("schema"))  # the fields of another schema are unknown
        try:
            row: Measurement = schema.build(cls, data)
        except ValueError as error:
            raise UsageError(f"the measurement does not follow the schema: {error}") from None
        return row

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read one line that :meth:`to_json` wrote. Raises UsageError if it is not one."""
        try:
            data = schema.loads(text)
        except ValueError as error:
            raise UsageError(f"not a measurement but {text[:80]!r}: {error}") from None
        if not isinstance(data, dict):
            raise UsageError(f"not a measurement but {text[:80]!r}, expected a JSON object")
        return cls.from_dict(data)


def read_records(path: str | Path) -> list[Measurement]:
    """Read every row of a file. Raises UsageError, which names a line that is not a row."""
    return parse_records(read_text(path), path)


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the records {path}: {error}") from None


def parse_records(text: str, path: str | Path) -> list[Measurement]:
    """As :func:`read_records`, from the text of the file at ``path``."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(Measurement.from_json(line))
            except UsageError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UsageError(f"{path} holds no records, expected lines of `bench --record {path}`")
    return rows


def append_records(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Append rows to a file. Raises UsageError if it cannot be written."""
    text = "".join(row.to_json() + "\n" for row in rows)
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"cannot write the records {path}: {error}") from None


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _check_schema(schema: object) -> None:
    if schema != SCHEMA:
        raise UsageError(
            f"the measurement has schema {schema!r}, this pocketslm reads {SCHEMA}; "
            "measure again or use the version that wrote it"
        )


def _stddev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
