"""KL against bytes, ours and llama.cpp's from one source: the table and the picture of ``bits``.

Ours gives each matrix its bits within a size (:mod:`pocketslm.export.quantize.sensitivity`) and
rounds with the calibration text. llama.cpp's types are made by its own ``llama_model_quantize``,
without and with an importance matrix of the same text: the mean square of what each matrix reads.
What is measured is the weights alone, dequantized, in the fp32 reference.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketslm.errors import UsageError
from pocketslm.export.quantize.calibration import quantize_layers, run_layer
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.quantize.sensitivity import Sizes, sensitivities
from pocketslm.export.quantize.tune import tune
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import Checkpoint, GGUFCheckpoint, open_checkpoint
from pocketslm.models.sites import LAYERS, Site
from pocketslm.models.tensors import QuantTensor, Weight

BITS = (2.75, 3.25, 4.0, 5.0)  # a weight, on average
METHODS = ("search+gptq", "search+gptq+tune")
TYPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
_MEASURED_TOKENS = 1024


def points(bench: Any) -> Iterator[tuple[str, str, Any]]:
    """(method, detail, maker) of each row, for :func:`pocketslm.export.methods.rows`.

    llama.cpp's rows are there for a GGUF file where llama-cpp-python is installed.
    """

    @functools.cache
    def measured(method: str) -> tuple[Sizes, Any]:
        sizes = Sizes(bench.checkpoint, _recipe(method))
        ids = bench.calibration[: max(1, _MEASURED_TOKENS // bench.window)]
        found = sensitivities(bench.model(), ids, sizes.base, list(sizes.costs), sizes.widths)
        return sizes, found

    def ours(method: str, detail: str) -> Any:
        start = time.perf_counter()
        sizes, losses = measured("search")
        parameters = sum(p.numel() for p in bench.model().parameters())
        megabytes = float(detail.split()[0]) * parameters / 8e6
        chosen = sizes.within(megabytes, losses).overrides
        recipe = _recipe(method, chosen)
        model, stored = _rounded(bench, recipe)
        seconds = time.perf_counter() - start
        size = sum(_bytes(stored.get(name), p) for name, p in model.named_parameters())
        about = {"table": "bits", "method": method, "detail": detail}
        return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    def theirs(method: str, detail: str) -> Any:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            with_matrix = method.endswith("imatrix")
            importance = _importance(bench) if with_matrix else {}
            llama_quantize(bench.checkpoint, detail, file, importance)
            seconds = time.perf_counter() - start
            checkpoint = open_checkpoint(file)
            model = bench.model(checkpoint)
            about = {"table": "bits", "method": method, "detail": detail}
            size = sum(info.nbytes for info in checkpoint.file.tensors.values())  # type: ignore[attr-defined]
            return bench.measure(model, **about, size_mb=size / 1e6, seconds=seconds)

    for bits in BITS:
        for method in METHODS:
            yield method, f"{bits} bits a weight", ours
    if isinstance(bench.checkpoint, GGUFCheckpoint) and find_spec("llama_cpp") is not None:
        for kind in TYPES:
            for method in ("llama.cpp", "llama.cpp, imatrix"):
                yield method, kind, theirs


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

    stored = quantize_layers(model, bench.calibration, spec, recipe.fit, use_gptq=recipe.use_gptq)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith(LAYERS):
            stored[name] = recipe.apply(name, parameter.cpu().numpy())
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(stored[name].dequantize()))  # type: ignore[union-attr]
    if recipe.use_tune:
        stored = tune(model, bench.model(), bench.calibration, stored, spec)
    return model, stored


def _bytes(weight: Weight | None, parameter: Any) -> int:
    return weight.nbytes if isinstance(weight, QuantTensor) else parameter.numel() * 4


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


def llama_quantize(
    checkpoint: Checkpoint, kind: str, target: Path, importance: dict[str, np.ndarray]
) -> None:
    """Write ``target``, the GGUF of ``checkpoint`` as llama.cpp's type ``kind``.

    ``importance``: mean squares of inputs by tensor name; empty: none. Raises UsageError where
    llama.cpp cannot do it.
    """
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    status = llama_cpp.llama_model_quantize(
        str(checkpoint.path).encode(), str(target).encode(), ctypes.byref(options)
    )
    if status:
        raise UsageError(f"llama.cpp cannot round {checkpoint.path} to {kind}: status {status}")
