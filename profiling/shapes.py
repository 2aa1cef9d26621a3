"""Which shape of a model is fast on a device: others with as many parameters, of random weights.

Each is one step away from a model of the catalog: deeper or shallower, a wider or narrower MLP,
more or fewer KV heads, another activation, the head tied or not. What a step adds is taken from the
width of the MLP, or of all, so that every shape has as many parameters. Speed and memory do not
depend on what the weights are.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.models.config import Attention, Layer, ModelConfig
from pocketslm.profiling import charts
from pocketslm.profiling.cost import Cost
from pocketslm.profiling.devices import open_device
from pocketslm.profiling.devices.bench import Conditions, bench_on_device
from pocketslm.profiling.plan import plan
from pocketslm.profiling.records import Measurement
from pocketslm.profiling.shape import catalog_config, random_bundles

Progress = Callable[[str, float], None]
_DEPTHS = (1 / 3, 1 / 2, 3 / 2, 2)  # times the model's own
_MLPS = (1 / 2, 2)
_MULTIPLE = 32  # of an MLP's neurons
_MOST_OFF = 0.03  # share of the parameters that a shape may have more or fewer


@dataclass(frozen=True)
class Shape:
    """One shape; ``name`` says what it has that the model has not."""

    name: str
    config: ModelConfig

    @property
    def parameters(self) -> int:
        return parameters(self.config)

    @property
    def facts(self) -> dict[str, Any]:
        a, mlp = self.config.attentions[0], self.config.stored_layers[0].mlp
        return {
            "shape": self.name,
            "layers": self.config.num_hidden_layers,
            "hidden": self.config.hidden_size,
            "mlp": mlp.width,
            "heads": a.heads,
            "kv_heads": a.kv_heads,
            "activation": mlp.activation + ("" if mlp.gated else ", no gate"),
            "tied": self.config.tie_word_embeddings,
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class Measured:
    """A shape with its tokens a second, and its peak of memory."""

    shape: Shape
    prefill_tps: float
    decode_tps: float
    ram_bytes: int

    def to_dict(self) -> dict[str, Any]:
        speeds = {"prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps}
        return self.shape.facts | speeds | {"ram_bytes": self.ram_bytes}


def parameters(config: ModelConfig) -> int:
    """Of all matrices."""
    cost = Cost.of(config)
    return cost.layer_macs + cost.embedding_values * (1 if cost.tied else 2)


def parse_parameters(text: str) -> int:
    """135M or 1.1B as a number; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text[:40]!r} is no number of parameters, expected such as 135M or 1.1B")
    return round(float(match[1]) * {"M": 1e6, "B": 1e9}[match[2]])


def family(name: str) -> ModelConfig:
    """The configuration of a catalog model whose layers are alike; UsageError for another."""
    config = catalog_config(name)
    if not config.head or len(set(config.stored_layers)) != 1:
        raise UsageError(f"{name} is no model of text whose layers are alike; choose another")
    if config.layer_sharing or config.stored_layers[0].attention is None:
        raise UsageError(f"{name} shares layers or has none of attention; choose another")
    return config


def sweep(base: ModelConfig, count: int) -> list[Shape]:
    """The shapes of ``count`` parameters around a model; the first has its own proportions.

    A shape that cannot have as many, or is there already, is left out. Raises UsageError where
    none can.
    """
    depth = max(1, round(base.num_hidden_layers * (count / parameters(base)) ** (1 / 3)))
    layer = base.stored_layers[0]
    mlp, a = layer.mlp, layer.attention
    assert a is not None
    share = mlp.width / base.hidden_size
    changes: list[tuple[str, ModelConfig, int, float, int | None]] = [
        ("as it is", base, depth, share, None),
        *((f"{n} layers", base, n, share, None) for n in _near(depth)),
        *((f"MLP x {factor:g}", base, depth, share * factor, None) for factor in _MLPS),
        ("one KV head", base, depth, share, 1),
        ("a KV head a head", base, depth, share, 0),
    ]
    plain = _with_layer(base, replace(layer, mlp=replace(mlp, activation="relu2", gated=False)))
    if mlp.gated:
        changes.append(("relu2, no gate", plain, depth, share * 1.5, None))
    tied = base.tie_word_embeddings
    retied = replace(base, tie_word_embeddings=not tied)
    changes.append(("head of its own" if tied else "tied head", retied, depth, share, None))
    found: list[Shape] = []
    for name, config, layers, ratio, kv_heads in changes:
        shape = Shape(name, _fitted(config, layers, ratio, kv_heads, count))
        new = all(shape.config != other.config for other in found)
        if new and abs(shape.parameters / count - 1) <= _MOST_OFF:
            found.append(shape)
    if not found:
        raise UsageError(
            f"no shape has {count / 1e6:.0f}M parameters: {base.vocab_size} tokens take most of "
            "them; ask for more, or another --family"
        )
    return found


def _fitted(
    base: ModelConfig, layers: int, ratio: float, kv_heads: int | None, count: int
) -> ModelConfig:
    """``layers`` of a width and an MLP of ``ratio`` times it that come nearest to ``count``.

    kv_heads: how many, 0 for as many as heads, None for the share of them that the model has.
    """
    a = base.stored_layers[0].attention
    assert a is not None

    def made(heads: int, width: float) -> ModelConfig:
        own = heads * a.kv_heads // a.heads
        kv = heads if kv_heads == 0 else kv_heads or own
        layer = base.stored_layers[0]
        size = max(_MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE)
        layer = replace(
            layer,
            mixer=replace(a, heads=heads, kv_heads=kv),
            mlp=replace(layer.mlp, width=size),
        )
        hidden = round(heads * base.hidden_size / a.heads / _MULTIPLE) * _MULTIPLE
        return _with_layer(replace(base, hidden_size=hidden), layer, layers)

    def off(config: ModelConfig) -> int:
        return abs(parameters(config) - count)

    proportional = (made(heads, heads * base.hidden_size / a.heads * ratio) for heads in _heads(a))
    best = min(proportional, key=off)
    heads = best.attentions[0].heads
    width = best.stored_layers[0].mlp.width
    each = (parameters(made(heads, width + _MULTIPLE)) - parameters(best)) / _MULTIPLE
    exact = made(heads, max(_MULTIPLE, round(width + (count - parameters(best)) / each)))
    return min(best, exact, key=off)


def _near(depth: int) -> list[int]:
    """Other numbers of layers."""
    return sorted({max(1, round(depth * factor)) for factor in _DEPTHS} - {depth})


def _heads(a: Attention) -> range:
    """Numbers of heads of which the model's share of KV heads is whole, as is their width."""
    step = math.lcm(
        a.heads // math.gcd(a.heads, a.kv_heads), _MULTIPLE // math.gcd(_MULTIPLE, a.head_dim)
    )
    return range(step, 8 * a.heads + 1, step)


def _with_layer(base: ModelConfig, layer: Layer, layers: int | None = None) -> ModelConfig:
    return replace(base, stored_layers=(layer,) * (layers or base.num_hidden_layers))


def measure(
    shapes: Sequence[Shape],
    device: str,
    *,
    n_prompt: int,
    n_gen: int,
    threads: Sequence[int],
    conditions: Conditions,
    progress: Progress = lambda step, fraction: None,
) -> list[Measured]:
    """Each shape made, measured on the device and thrown away; the fastest to decode first."""
    tests = plan(shapes[0].config.vocab_size, n_prompt=[n_prompt], n_gen=[n_gen])
    found = []
    with open_device(device) as opened:
        for done, shape in enumerate(shapes):
            progress(shape.name, done / len(shapes))
            rows: list[Measurement] = []
            with random_bundles([("random", shape.config)]) as bundles:
                bench_on_device(
                    opened,
                    bundles,
                    tests=tests,
                    threads=threads,
                    conditions=conditions,
                    keep=rows.append,
                )
            prefill, decode = rows
            speeds = (statistics.median(prefill.prefill_tps), statistics.median(decode.decode_tps))
            ram = max(row.peak_rss_bytes or 0 for row in rows)
            found.append(Measured(shape, *speeds, ram))
    progress("done", 1.0)
    return sorted(found, key=lambda one: one.decode_tps, reverse=True)


def table(found: Sequence[Measured]) -> str:
    """As Markdown."""
    lines = [
        "| shape | layers | hidden | MLP | heads | parameters | prefill, t/s | decode, t/s | MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        facts = one.shape.facts
        lines.append(
            f"| {one.shape.name} | {facts['layers']} | {facts['hidden']} | {facts['mlp']} "
            f"| {facts['heads']}/{facts['kv_heads']} | {one.shape.parameters / 1e6:.1f}M "
            f"| {one.prefill_tps:.1f} | {one.decode_tps:.2f} | {one.ram_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def chart(found: Sequence[Measured]) -> str:
    """An SVG file: decode speed of each shape, the fastest first."""
    rows = [
        charts.Bar(
            one.shape.name,
            [(one.decode_tps, 0)],
            f"{one.decode_tps:.1f} t/s, prefill {one.prefill_tps:.0f}",
        )
        for one in found
    ]
    return charts.standalone(charts.bars(rows, "decode speed by shape, at as many parameters"))
