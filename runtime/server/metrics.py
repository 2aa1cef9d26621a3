"""What the server did, for Prometheus: counters as text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from pocketslm.runtime.server.app import Answer

MEDIA_TYPE = "text/plain; version=0.0.4"
OTHER = "other"  # the route of what is no route
# Upper bounds of a histogram, in seconds.
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counts since the server began. Only the event loop's thread touches them."""

    def __init__(self) -> None:
        self._requests: Counter[Labels] = Counter()
        self._tokens: dict[str, Counter[Labels]] = {"prompt": Counter(), "generated": Counter()}
        self._answered = _Histogram()
        self._first = _Histogram()

    def request(self, route: str, status: int) -> None:
        self._requests[("route", route), ("status", str(status))] += 1

    @contextmanager
    def making(self, answer: Answer) -> Iterator[None]:
        """Count an answer that is made meanwhile, also where it is cut short."""
        start = time.perf_counter()
        labels = (("model", answer.name),)
        try:
            yield
        finally:
            if answer.made:
                self._tokens["prompt"][labels] += answer.prompt_tokens
                self._tokens["generated"][labels] += answer.made
                self._answered.add(labels, time.perf_counter() - start)
            if answer.first_ns:
                self._first.add(labels, answer.first_ns / 1e9)

    def text(self, waiting: Mapping[str, int]) -> str:
        """The exposition; ``waiting``: by model, how many requests it answers or has in line."""
        queue: dict[Labels, float] = {(("model", name),): count for name, count in waiting.items()}
        parts = [
            _family("requests_total", "counter", "Requests that were answered.", self._requests),
            *(
                _family(f"{kind}_tokens_total", "counter", f"Tokens, {kind}.", counts)
                for kind, counts in self._tokens.items()
            ),
            _family("waiting", "gauge", "Requests being answered or in line.", queue),
            self._first.family("first_token_seconds", "Seconds to an answer's first token."),
            self._answered.family("answer_seconds", "Seconds that making an answer took."),
        ]
        return "".join(parts)


class _Histogram:
    def __init__(self) -> None:
        self._counts: dict[Labels, list[int]] = {}  # by bound, and all
        self._sums: dict[Labels, float] = {}

    def add(self, labels: Labels, seconds: float) -> None:
        counts = self._counts.setdefault(labels, [0] * (len(BOUNDS) + 1))
        for at, bound in enumerate((*BOUNDS, float("inf"))):
            counts[at] += seconds <= bound
        self._sums[labels] = self._sums.get(labels, 0.0) + seconds

    def family(self, name: str, about: str) -> str:
        rows: dict[str, Mapping[Labels, float]] = {"_bucket": {}, "_sum": self._sums, "_count": {}}
        names = [*map(str, BOUNDS), "+Inf"]
        for labels, counts in self._counts.items():
            buckets = {(*labels, ("le", bound)): n for bound, n in zip(names, counts, strict=True)}
            rows["_bucket"] = {**rows["_bucket"], **buckets}
            rows["_count"] = {**rows["_count"], labels: counts[-1]}
        head = _head(name, "histogram", about)
        return head + "".join(_rows(name + end, values) for end, values in rows.items())


def _family(name: str, kind: str, about: str, values: Mapping[Labels, float]) -> str:
    return _head(name, kind, about) + _rows(name, values)


def _head(name: str, kind: str, about: str) -> str:
    return f"# HELP pocketslm_{name} {about}\n# TYPE pocketslm_{name} {kind}\n"


def _rows(name: str, values: Mapping[Labels, float]) -> str:
    rows = []
    for labels, value in values.items():
        said = ",".join(f"{key}={_quoted(text)}" for key, text in labels)
        rows.append(f"pocketslm_{name}{{{said}}} {value}\n")
    return "".join(rows)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class Measured:
    """The application around it, whose requests are counted when they were answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path: Any = scope["path"]
        try:
            await self._app(scope, receive, sent)
        finally:
            self._metrics.request(path if path in self._paths else OTHER, status)
