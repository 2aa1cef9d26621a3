"""KL against bytes, ours and llama.cpp's from one source: the table and the picture of ``bits``.

Ours gives each matrix its bits within a size (:mod:`pocketslm.export.quantize.sensitivity`) and
rounds with the calibration text. llama.cpp's types are made by its own ``llama_model_quantize``,
without and with an importance matrix of the same text: the mean square of what each matrix reads.
What is measured is the weights alone, dequantized, in the fp32 reference.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketslm import schema
from pocketslm.errors import UsageError
from pocketslm.export.quantize.calibration import quantize_layers, run_layer
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.quantize.sensitivity import Losses, Sizes, sensitivities
from pocketslm.export.quantize.tune import tune
from pocketslm.export.recipe import Recipe
from pocketslm.folders import written
from pocketslm.models.checkpoint import GGUFCheckpoint
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.sites import LAYERS, Site
from pocketslm.models.tensors import Weight, floats, stored_bytes

BITS = (2.75, 3.25, 4.0, 4.5, 5.0)  # a weight, on average
METHODS = ("search+gptq", "search+gptq+tune")
# "pure": the embedding takes the type, too. K-blocks of 256 do not divide the rows of many small
# models, which then take wider types.
TYPES = (
    *("IQ4_NL pure", "Q4_1 pure"),
    *("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"),
)
PLAIN, WITH_MATRIX = "llama.cpp", "llama.cpp, imatrix"


def points(bench: Any, losses: Path) -> Iterator[tuple[str, str, Any]]:
    """(method, detail, maker) of each row, for :func:`pocketslm.export.methods.rows`.

    ``losses``: where the loss of each matrix at each width is kept for the next run. llama.cpp's
    rows are there for a GGUF file where llama-cpp-python is installed.
    """

    @functools.cache  # the same for every size
    def measured() -> tuple[Sizes, Losses]:
        sizes = Sizes(bench.checkpoint, _recipe(METHODS[0]))
        found = _read(losses, bench.identity, sizes.costs)
        if found is None:
            found = sensitivities(bench.model(), bench.calibration, sizes.base, sizes.widths)
            _write(losses, bench.identity, found)
        return sizes, found

    @functools.cache  # and for every type
    def importance() -> dict[str, np.ndarray]:
        return _importance(bench)

    def ours(method: str, detail: str) -> Any:
        start = time.perf_counter()
        sizes, losses = measured()
        parameters = sum(map(prod, parameter_shapes(bench.checkpoint.config).values()))
        megabytes = float(detail.split()[0]) * parameters / 8e6
        recipe = _recipe(method, sizes.within(megabytes, losses).overrides)
        model, stored = _rounded(bench, recipe)
        seconds = time.perf_counter() - start
        size = sum(stored_bytes(stored.get(n, p)) for n, p in model.named_parameters())
        about = {"table": "bits", "method": method, "detail": detail}
        return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    def theirs(method: str, detail: str) -> Any:
        from pocketslm.profiling.peers.llama_cpp import quantize

        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            by_name = importance() if method == WITH_MATRIX else None
            kind = detail.removesuffix(" pure")
            quantize(bench.checkpoint.path, kind, file, by_name, pure=kind != detail)
            seconds = time.perf_counter() - start
            checkpoint = GGUFCheckpoint(file)
            about = {"table": "bits", "method": method, "detail": detail}
            size = sum(info.nbytes for info in checkpoint.file.tensors.values())
            model = bench.model(checkpoint)
            return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    for bits in BITS:
        for method in METHODS:
            yield method, f"{bits} bits a weight", ours
    if isinstance(bench.checkpoint, GGUFCheckpoint) and find_spec("llama_cpp") is not None:
        for kind in TYPES:
            for method in (PLAIN, WITH_MATRIX):
                yield method, kind, theirs


def _read(
    path: Path, identity: dict[str, Any], costs: Mapping[tuple[str, ...], Mapping[int, int]]
) -> Losses | None:
    """What :func:`_write` kept there; UsageError where it is not of this model and setting, or has
    other sites and widths than ``costs``."""
    if not path.exists():
        return None
    try:
        kept = schema.loads(path.read_text("utf-8"))
        found = {
            tuple(site): {int(bits): float(loss) for bits, loss in by_bits.items()}
            for site, by_bits in kept["losses"]
        }
        same = kept["identity"] == identity
        whole = {site: set(losses) for site, losses in found.items()} == {
            site: set(bits) for site, bits in costs.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{path} is not a file of losses; remove it") from None
    if not same:
        raise UsageError(f"{path} holds losses of another model or setting; choose another")
    if not whole:
        raise UsageError(f"{path} lacks losses, or has some of no matrix; remove it")
    return found


def _write(path: Path, identity: dict[str, Any], losses: Losses) -> None:
    with written(path) as part:
        part.write_text(json.dumps({"identity": identity, "losses": list(losses.items())}) + "\n")


def chart(rows: Sequence[Any]) -> str:
    """An SVG of the table's rows: KL against megabytes, a line a method."""
    from pocketslm.profiling import charts

    methods = list(dict.fromkeys(row.method for row in rows if row.table == "bits"))
    series = []
    for colour, method in enumerate(methods):
        chosen = sorted((r for r in rows if r.method == method), key=lambda row: row.size_mb)
        labels = [row.detail.removesuffix(" bits a weight") for row in chosen]
        points = [(row.size_mb, row.kl) for row in chosen]
        series.append(charts.Series(method, points, colour, labels=labels))
    size = charts.Axis("weights, MB", zero=False)
    return charts.standalone(
        charts.plot(series, size, charts.Axis("KL to the source, nats", log=True), "Bits and loss")
    )


def _recipe(method: str, overrides: Any = None) -> Recipe:
    return Recipe(
        weights="int4",
        head="int4",
        grid="min8",
        method=method,
        calibration="given",
        overrides=overrides or {},
    )


def _rounded(bench: Any, recipe: Recipe) -> tuple[Any, dict[str, Weight]]:
    """The reference model with every matrix rounded, and what is stored."""
    model = bench.model()

    def spec(name: str) -> Spec | None:
        return recipe.spec(name, quantized=False)

    stored = dict(
        quantize_layers(model, bench.calibration, spec, recipe.fit, use_gptq=recipe.use_gptq)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name not in stored:  # an embedding beside another head
            stored[name] = recipe.apply(name, parameter.cpu().numpy())
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(floats(stored[name])))
    if recipe.use_tune:
        stored = tune(model, bench.model(), bench.calibration, stored, spec)
    return model, stored


@torch.no_grad()
def _importance(bench: Any) -> dict[str, np.ndarray]:
    """The mean square of each input of a matrix, by the GGUF's name of it."""
    model, names = bench.model(), bench.checkpoint.architecture.gguf
    x = model.embed(bench.calibration)
    found: dict[str, np.ndarray] = {}
    for index in range(len(model.model.layers)):

        def keep(site: Site, hessian: torch.Tensor, index: int = index) -> None:
            for part in site.matrices:
                stored = names.stored(f"{LAYERS}{index}.{part}.weight")
                found[stored] = hessian.diagonal().float().cpu().numpy().copy()

        x = run_layer(model, index, x, keep)
    return found
