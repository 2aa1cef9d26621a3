"""Compression methods beside each other on one model, as in docs/explanation/compression.md.

Weights alone are compressed; the forward pass is the fp32 reference, on a GPU where torch finds
one. Rows are appended to a file as they come, and a row that is there already is not made again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketslm.errors import UsageError
from pocketslm.export import bits
from pocketslm.export.calibration_text import calibration_windows
from pocketslm.export.evaluate import Ids, compare, windows_of
from pocketslm.export.prune import adaptive, depth, sparse, width
from pocketslm.export.quantize.calibration import quantize_layers
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.quantize.tune import tune
from pocketslm.export.recipe import GROUP_SIZES, Recipe
from pocketslm.export.text import read_text
from pocketslm.models.catalog import resolve
from pocketslm.models.checkpoint import Checkpoint, checkpoint_sha256
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import LAYERS
from pocketslm.models.tensors import stored_bytes
from pocketslm.runtime.tokenizer import load_tokenizer_files

TABLES = ("quantize", "depth", "width", "adaptive", "sparse", "bits")
METHODS = (
    "rtn",
    "search",
    "hqq",
    "gptq",
    "search+gptq",
    "awq",
    "awq+search+gptq",
    "search+gptq+tune",
)
_WITHOUT_DATA = ("rtn", "hqq")
GRIDS = ("sym", "min")
SEED = 0
_DEPTH_SHARES = (0.1, 0.2)


@dataclass(frozen=True)
class Row:
    """One method measured. ``size_mb``: of all weights as stored; ``seconds``: of the method."""

    table: str
    method: str
    detail: str
    perplexity: float
    change: float
    kl: float
    top1: float
    size_mb: float
    seconds: float


class Workbench:
    """The model, its own logits on the test windows, and the calibration windows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Path,
        calibration: str,
        *,
        windows: int,
        tokens: int,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        checkpoint.config.need_head("methods")
        checkpoint.config.need_own_layers("methods")
        self.checkpoint = checkpoint
        self.window = 512
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        files = checkpoint.tokenizer_files()
        tokenizer = load_tokenizer_files(files)
        ids = tokenizer.encode(read_text(text))
        self.windows: list[Ids] = windows_of(ids, self.window, windows)
        if text == resolve(calibration) and len(ids) < windows * self.window + tokens:
            raise UsageError(
                f"{text} has {len(ids)} tokens, expected {windows * self.window} to measure with "
                f"and {tokens} others to calibrate with"
            )
        seen = calibration_windows(calibration, tokenizer, tokens, self.window, say)
        self.calibration = seen.to(self.device)
        self.identity = {
            "model": checkpoint_sha256(checkpoint),
            "text": text.name,
            "windows": windows,
            "calibration": Path(calibration).name,
            "tokens": tokens,
        }
        self.source = [self._logits(self.model(), window) for window in self.windows]

    def model(self, checkpoint: Checkpoint | None = None) -> Any:
        return load_reference(checkpoint or self.checkpoint, self.window).to(self.device)

    def measure(self, model: Any, **about: Any) -> Row:
        sums = np.zeros(4)
        for source, window in zip(self.source, self.windows, strict=True):
            sums += compare(source, self._logits(model, window), window)
        source_nll, nll, kl, agreements = sums
        positions = self.window * len(self.windows)
        predicted = positions - len(self.windows)
        return Row(
            perplexity=float(np.exp(nll / predicted)),
            change=float(np.exp((nll - source_nll) / predicted) - 1),
            kl=float(kl / positions),
            top1=float(agreements / positions),
            **about,
        )

    @torch.no_grad()
    def _logits(self, model: Any, window: Ids) -> Tensor:
        ids = torch.from_numpy(window)[None].to(self.device)
        logits: Tensor = model(ids, model.empty_cache())[0][0]
        return logits


def rows(
    bench: Workbench,
    results: Path,
    tables: Sequence[str],
    say: Callable[[str], None],
    only: str = "",
) -> list[Row]:
    """Every row of ``tables``, those not yet in ``results`` measured now.

    ``only``: those rows whose "table method detail" has this text. Raises UsageError where
    ``results`` is of another model, text or setting, or no row is left.
    """
    done = _read(results, bench.identity)
    if not done:
        results.write_text(json.dumps(bench.identity) + "\n")
    makers: dict[str, Callable[[Workbench], Iterator[tuple[str, str, Maker]]]] = {
        "quantize": _quantized,
        "depth": _shallow,
        "width": _narrow,
        "adaptive": _adaptive,
        "sparse": _sparse,
        "bits": functools.partial(bits.points, losses=results.with_suffix(".losses.json")),
    }
    found = []
    for table in tables:
        for method, detail, make in makers[table](bench):
            key = table, method, detail
            if only not in " ".join(key):
                continue
            if key not in done:
                say(" ".join(key))
                row = make(method, detail)
                with results.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                done[key] = row
            found.append(done[key])
    if not found:
        raise UsageError(f"no row of {', '.join(tables)} has {only!r} in its name")
    return found


Maker = Callable[[str, str], Row]


def _quantized(bench: Workbench) -> Iterator[tuple[str, str, Maker]]:
    def make(method: str, detail: str) -> Row:
        kind, group = detail.split(" g")
        recipe = Recipe(
            weights="int4",
            grid=kind,  # type: ignore[arg-type]
            group_size=int(group),
            method=method,
            calibration="given",
        )
        model = bench.model()
        start = time.perf_counter()

        def spec(name: str) -> Spec | None:  # the table is of layers; the head stays as it is
            return recipe.spec(name, quantized=False) if name.startswith(LAYERS) else None

        stored = dict(
            quantize_layers(
                model,
                bench.calibration if method not in _WITHOUT_DATA else bench.calibration[:1, :2],
                spec,
                recipe.fit,
                use_awq=recipe.use_awq,
                use_gptq=recipe.use_gptq,
            )
        )
        if recipe.use_tune:
            stored = tune(model, bench.model(), bench.calibration, stored, spec)
        seconds = time.perf_counter() - start
        size = 0
        for name, _ in model.named_parameters():
            weight = stored[name] if name in stored else bench.checkpoint.weight(name)
            size += stored_bytes(weight)
        about = {"table": "quantize", "method": method, "detail": detail}
        return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    for group in GROUP_SIZES:
        for kind in GRIDS:
            for method in METHODS:
                if method != "hqq" or kind == "min":
                    yield method, f"{kind} g{group}", make


def _shallow(bench: Workbench) -> Iterator[tuple[str, str, Maker]]:
    count = bench.checkpoint.config.num_hidden_layers
    ids = bench.calibration
    removals = sorted({max(round(share * count), 1) for share in _DEPTH_SHARES})

    @functools.cache  # greedy: the layers to go first are the same for every number of them
    def sleb() -> tuple[list[int], float]:
        start = time.perf_counter()
        return depth.sleb(bench.model(), ids, removals[-1]), time.perf_counter() - start

    def make(method: str, detail: str) -> Row:
        remove = int(detail.split()[0])
        start = time.perf_counter()
        if method == "last":
            removed = depth.last(count, remove)
        elif method == "block influence":
            removed = depth.least_influence(depth.block_influence(bench.model(), ids), remove)
        seconds = time.perf_counter() - start
        if method == "sleb":
            order, seconds = sleb()
            removed = order[:remove]
        pruned = bench.model(depth.WithoutLayers(bench.checkpoint, removed))
        about = {"table": "depth", "method": f"{method}: {sorted(removed)}", "detail": detail}
        return bench.measure(pruned, **about, size_mb=_fp32_mb(pruned), seconds=seconds)

    for remove in removals:
        for method in ("last", "block influence", "sleb"):
            yield method, f"{remove} of {count} layers", make


def _narrow(bench: Workbench) -> Iterator[tuple[str, str, Maker]]:
    c = bench.checkpoint.config
    ids = bench.calibration[:8]
    targets: dict[str, dict[str, int]] = {
        "neurons 7/8": {"neurons": c.intermediate_size * 7 // 8},
        "neurons 3/4": {"neurons": c.intermediate_size * 3 // 4},
        "channels 15/16": {"channels": c.hidden_size * 15 // 16},
    }
    most = max(a.kv_heads for a in c.attentions)
    if most > 1:
        targets["one KV head less"] = {"groups": most - 1}

    def make(method: str, detail: str) -> Row:
        model = bench.model()
        start = time.perf_counter()
        if method == "minitron":
            importance = width.activation_importance(model, ids)
        elif method == "magnitude":
            importance = width.magnitude_importance(model)
        else:
            importance = width.random_importance(c, SEED)
        kept = width.keep_top(importance, **targets[detail])
        seconds = time.perf_counter() - start
        pruned = bench.model(width.Narrowed(bench.checkpoint, kept))
        about = {"table": "width", "method": method, "detail": detail}
        return bench.measure(pruned, **about, size_mb=_fp32_mb(pruned), seconds=seconds)

    for detail in targets:
        for method in ("random", "magnitude", "minitron"):
            yield method, detail, make


def _adaptive(bench: Workbench) -> Iterator[tuple[str, str, Maker]]:
    config = bench.checkpoint.config
    ids = bench.calibration[:2]  # forward and backward, once a step of 5 %

    def make(method: str, detail: str) -> Row:
        model = bench.model()
        start = time.perf_counter()
        kept = adaptive.prune(
            model,
            adaptive.everything(config),
            ids,
            int(detail.split()[0]) / 100,
            amplitude=adaptive.AMPLITUDE if method == "adaptive" else 0.0,
        )
        seconds = time.perf_counter() - start
        pruned = bench.model(width.Narrowed(bench.checkpoint, kept))
        about = {"table": "adaptive", "method": method, "detail": detail}
        return bench.measure(pruned, **about, size_mb=_fp32_mb(pruned), seconds=seconds)

    for percent in (10, 20):
        for method in ("uniform", "adaptive"):
            yield method, f"{percent} % of the layers", make


def _sparse(bench: Workbench) -> Iterator[tuple[str, str, Maker]]:
    """Size: fp32 values that are left, and a bit for each weight; no target stores it so."""

    def make(method: str, detail: str) -> Row:
        model = bench.model()
        pattern = sparse.parse_pattern(detail.split()[0])
        start = time.perf_counter()
        sparse.sparsify(model, bench.calibration[:4], pattern, wanda=method == "wanda")
        seconds = time.perf_counter() - start
        size = sparse.compressed_bytes(model)
        about = {"table": "sparse", "method": method, "detail": detail}
        return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    for detail in ("0.5 zeros", "2:4", "4:8"):
        for method in ("magnitude", "wanda"):
            yield method, detail, make


def _fp32_mb(model: Any) -> float:
    count: int = sum(parameter.numel() for parameter in model.parameters())
    return count * 4 / 1e6


def _read(results: Path, identity: dict[str, Any]) -> dict[tuple[str, str, str], Row]:
    if not results.exists():
        return {}
    try:
        first, *others = (json.loads(line) for line in results.read_text("utf-8").splitlines())
        found = [_row(other) for other in others]
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        raise UsageError(f"{results} is not a file of results; choose another") from None
    if first != identity:
        raise UsageError(f"{results} holds results of another model or setting; choose another")
    return {(row.table, row.method.split(":")[0], row.detail): row for row in found}


def _row(data: dict[str, Any]) -> Row:
    row = Row(**data)
    texts, numbers = astuple(row)[:3], astuple(row)[3:]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return Row(*texts, *map(float, numbers))


def markdown(found: Sequence[Row]) -> str:
    """A table for each of the tables that have rows."""
    parts = []
    for table in TABLES:
        chosen = [row for row in found if row.table == table]
        if not chosen:
            continue
        lines = [
            "| what | method | perplexity | change | KL, nats | top-1 | MB | s |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row.detail} | {row.method} | {row.perplexity:.2f} | {row.change:+.2%} "
            f"| {row.kl:.4f} | {row.top1:.3f} | {row.size_mb:.1f} | {row.seconds:.0f} |"
            for row in chosen
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
