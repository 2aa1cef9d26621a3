"""Checkpoint -> bundle: read, quantize, lower, write aside, rename."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pocketslm import __version__
from pocketslm.errors import BundleError, ExportError
from pocketslm.export.lower.trace import Traced, trace
from pocketslm.export.prune.depth import WithoutLayers
from pocketslm.export.prune.vocabulary import TrimmedVocabulary, parse_ranges
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.recipe import RECIPE_FILE, Recipe
from pocketslm.export.shelf import Shelf, StoredWeights, need_room
from pocketslm.export.tokenizer import settled
from pocketslm.folders import published, written
from pocketslm.models.checkpoint import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    checkpoint_sha256,
    one_line,
)
from pocketslm.models.config import ModelConfig
from pocketslm.models.pooling import MODULES
from pocketslm.models.tensors import QuantTensor, floats
from pocketslm.runtime.adapters import PREFIX, SUFFIX, read_updates
from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, Graph, Manifest, file_entry
from pocketslm.runtime.config import generation_defaults
from pocketslm.runtime.tokenizer import Tokenizer, load_tokenizer
from pocketslm.runtime.tokenizer.identity import Identity
from pocketslm.terminal import without_warnings

Progress = Callable[[str, float], None]
Reader = Callable[[], Tokenizer]  # reads the bundle's tokenizer, once for all who ask


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe | None = None,
    *,
    adapters: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = lambda step, fraction: None,
    say: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Write the bundle ``out`` and return its manifest.

    ``adapters``: folders of LoRA adapters that PEFT saved, to lie beside the base's weights.
    The bundle appears whole or not at all: it is written beside ``out`` and renamed; ``say`` tells
    where ``overwrite`` leaves a moment without one. What killed exports left of it is removed.
    ``progress`` is called with the step's name and the fraction of it that is done. Raises
    ExportError where ``out`` is in the way or cannot be written, CheckpointError where the source
    cannot be read.
    """
    recipe = (recipe or Recipe()).resolved(checkpoint.config)
    if not checkpoint.config.head and checkpoint.config.pooling is None:
        raise ExportError(
            f"{checkpoint.path} has no {MODULES}, which says how embeddings are pooled; expected "
            "a folder of sentence-transformers: save it with `SentenceTransformer.save`"
        )
    asked = [target for target in recipe.targets or () if target.startswith("executorch")]
    if asked and find_spec("executorch") is None:
        raise ExportError(
            f"target {asked[0]!r} needs ExecuTorch; install it with "
            "`pip install pocketslm[executorch]` or leave the target out"
        )
    if recipe.vocabulary is not None:
        checkpoint = TrimmedVocabulary(checkpoint, parse_ranges(recipe.vocabulary))
    if recipe.removed_layers is not None:
        checkpoint = WithoutLayers(checkpoint, parse_ranges(recipe.removed_layers))
    if recipe.overrides:
        _check_overrides(recipe, checkpoint.config)
    if out.exists() and not (overwrite and (out / MANIFEST).exists()):
        hint = "use --overwrite to replace it" if (out / MANIFEST).exists() else "choose another"
        raise ExportError(f"{out} exists already; {hint}")
    with published(out, replace=overwrite, say=say) as folder, ExitStack() as stack:
        files, notes = settled(
            checkpoint.tokenizer_files(),
            checkpoint.config.vocab_size,
            generates=checkpoint.config.head,
        )
        for name, content in files.items():
            (folder / name).write_bytes(content)
        generation_defaults(folder)  # which reads them as every run will
        recipe, ids = _calibration(recipe, folder, checkpoint.config)
        if recipe.neurons is not None:
            checkpoint = _with_neurons(checkpoint, ids, recipe.neurons)
        need_room(checkpoint, recipe, folder)
        shelf = stack.enter_context(closing(Shelf(folder)))
        if ids is not None:
            _quantize(checkpoint, recipe, ids, shelf, progress)
        assert recipe.targets is not None
        (folder / RECIPE_FILE).write_text(recipe.to_toml())
        for adapter in adapters:
            _carry(checkpoint, adapter, recipe, folder)
        stored = StoredWeights(checkpoint, recipe, shelf)
        assert recipe.context is not None
        progress("trace", 0.0)
        traced = trace(checkpoint.config, recipe.context)
        progress("trace", 1.0)
        stored.notes += notes
        tokenizer = functools.cache(functools.partial(load_tokenizer, folder))
        graphs = [
            lower(traced, recipe, stored, folder, tokenizer, progress)
            for target, lower in _LOWERINGS.items()
            if target in recipe.targets
        ]
        progress("hash", 0.0)
        manifest = Manifest(
            name=checkpoint.name,
            architecture=checkpoint.config.to_dict(),
            source={
                "name": checkpoint.name,
                "format": checkpoint.format,
                "licence": checkpoint.licence,
                "sha256": checkpoint_sha256(checkpoint),
                "made_from": checkpoint.made_from,
            },
            recipe=recipe.to_dict(),
            graphs=graphs,
            files={path.name: file_entry(path) for path in sorted(folder.iterdir())},
            weights=dict(stored.bytes_by_scheme),
            notes=[*checkpoint.notes, *stored.notes],
            pocketslm=__version__,
        )
        (folder / MANIFEST).write_text(manifest.to_json())
        progress("hash", 1.0)
    return manifest


def _check_overrides(recipe: Recipe, config: ModelConfig) -> None:
    from pocketslm.models.reference import parameter_shapes

    matrices = {name for name, shape in parameter_shapes(config).items() if len(shape) == 2}
    if unknown := sorted(recipe.overrides.keys() - matrices - {EMBEDDING, HEAD}):
        raise ExportError(f"overrides name {unknown[0]!r}, which is no matrix of the model")


def _calibration(recipe: Recipe, folder: Path, config: ModelConfig) -> tuple[Recipe, Any]:
    """The recipe with its calibration text's SHA-256, and the text's tokens [B, S], if any.

    ``folder`` holds the tokenizer. No window is longer than the model's positions. Raises
    ExportError where the text is not the recipe's.
    """
    if recipe.calibration is None:
        return recipe, None
    from pocketslm.export.calibration_text import calibration_sha256, calibration_windows

    text, tokens = recipe.calibration, recipe.calibration_tokens
    window = min(recipe.calibration_window, config.max_position_embeddings)
    ids = calibration_windows(text, load_tokenizer(folder), tokens, window)
    sha256 = calibration_sha256(text)
    if recipe.calibration_sha256 not in (None, sha256):
        raise ExportError(f"{text} is not the recipe's calibration text (SHA-256 differs)")
    return replace(recipe, calibration_sha256=sha256, calibration_window=window), ids


def _with_neurons(checkpoint: Checkpoint, ids: Any, neurons: int) -> Checkpoint:
    """The checkpoint with the most important ``neurons`` of each layer's MLP alone."""
    from pocketslm.export.prune import width
    from pocketslm.models.reference import load_reference

    checkpoint.config.need_own_layers("--neurons")
    importance = width.activation_importance(load_reference(checkpoint, ids.shape[1]), ids)
    return width.Narrowed(checkpoint, width.keep_top(importance, neurons=neurons))


def _quantize(
    checkpoint: Checkpoint, recipe: Recipe, ids: Any, shelf: Shelf, progress: Progress
) -> None:
    """Put the weights on the shelf that calibration on ``ids`` decides.

    They come layer by layer, from a model that has one of them in memory at a time; to tune the
    whole, it must be there whole, twice.
    """
    import torch

    from pocketslm.export.quantize.calibration import quantize_layers
    from pocketslm.export.quantize.tune import tune
    from pocketslm.models.reference import Layers, load_reference

    def spec(name: str) -> Spec | None:
        return recipe.spec(name, quantized=isinstance(checkpoint.weight(name), QuantTensor))

    def head(name: str) -> torch.Tensor:
        return torch.from_numpy(floats(checkpoint.weight(name)))

    window = ids.shape[1]
    options: dict[str, Any] = {
        "use_awq": recipe.use_awq,
        "use_gptq": recipe.use_gptq,
        "progress": lambda fraction: progress("quantize", fraction),
    }
    if recipe.use_tune:
        model, teacher = (load_reference(checkpoint, window) for _ in range(2))
        rounded = dict(quantize_layers(model, ids, spec, recipe.fit, **options))
        tuned = tune(model, teacher, ids, rounded, spec, lambda share: progress("tune", share))
        weights = iter(tuned.items())
    else:
        tokens, ids = torch.unique(ids, return_inverse=True)
        layers = Layers(TrimmedVocabulary(checkpoint, tokens.tolist()), window)
        weights = quantize_layers(
            layers.model, ids, spec, recipe.fit, head=head, hold=layers.held, **options
        )
    for name, weight in weights:
        shelf[name] = weight


def _carry(checkpoint: Checkpoint, adapter: Path, recipe: Recipe, folder: Path) -> None:
    """``adapter-NAME.safetensors``, whose factors read what the base's matrices read."""
    from safetensors.numpy import save_file

    from pocketslm.models.updated import WithAdapter

    name = adapter.resolve().name
    if not re.fullmatch(r"[\w.-]{1,100}", name):
        raise ExportError(f"{name!r} cannot name an adapter, expected letters, digits, - _ and .")
    if "native" not in (recipe.targets or ()):
        raise ExportError(f"adapter {name} needs the native target; or merge it: MODEL+{adapter}")
    if recipe.use_awq or recipe.removed_layers is not None or recipe.neurons is not None:
        raise ExportError(
            f"pruning and awq change what adapter {name} reads; merge it: MODEL+{adapter}"
        )
    file = folder / f"{PREFIX}{name}{SUFFIX}"
    save_file(WithAdapter(checkpoint, adapter).factors(), file)
    try:
        read_updates(file)  # as every run will
    except BundleError as error:
        raise ExportError(f"{one_line(error)}; merge it: MODEL+{adapter}") from None


def update_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a bundle's manifest in one step."""
    with written(folder / MANIFEST) as part:
        part.write_text(manifest.to_json())


def _lower_native(
    traced: Traced,
    recipe: Recipe,
    weights: StoredWeights,
    folder: Path,
    tokenizer: Reader,
    progress: Progress,
) -> Graph:
    """``model.slm``, with tokenizer and chat template inside where the runner covers them."""
    from pocketslm.export.lower import native
    from pocketslm.export.lower.native_chat import chat_parts
    from pocketslm.export.lower.native_tokenizer import pack_tokenizer

    progress("lower to native", 0.0)
    packed, reason = pack_tokenizer((folder / "tokenizer.json").read_bytes())
    chat, no_chat = chat_parts(tokenizer())
    if reason:
        weights.notes.append(f"pocketslm-run takes token ids of this model, not text: {reason}")
    elif no_chat and traced.config.head:
        weights.notes.append(f"pocketslm-run has no chat mode for this model: {no_chat}")
    report = native.lower(
        traced,
        weights,
        folder / "model.slm",
        tokenizer=packed,
        chat=chat,
        progress=lambda done, total: progress("lower to native", done / total),
    )
    if report.rounded_scales:
        weights.notes.append(
            f"native: scales of {len(report.rounded_scales)} matrices were rounded to fp16"
        )
    return Graph("native", "model.slm", traced.context, recipe.kv_cache)


def _lower_onnx(
    traced: Traced,
    recipe: Recipe,
    weights: StoredWeights,
    folder: Path,
    tokenizer: Reader,
    progress: Progress,
) -> Graph:
    """``model.onnx``, its data, and ``genai_config.json`` of a model that generates text."""
    from pocketslm.export.lower import onnx
    from pocketslm.export.lower.genai import genai_config

    config = traced.config
    weights.notes += onnx.lower(
        traced,
        weights,
        folder,
        dtype=recipe.dtype,
        progress=lambda done, total: progress("lower to onnx", done / total),
    )
    if len({(a.kv_heads, a.head_dim) for a in config.attentions}) != 1:
        weights.notes.append("onnxruntime-genai cannot run layers with different KV heads")
    if config.head:  # it runs nothing else
        description = genai_config(config, traced.context, folder, tokenizer().identity)
        (folder / GENAI_CONFIG).write_text(json.dumps(description, indent=4) + "\n")
    return Graph("onnx", onnx.GRAPH_FILE, traced.context, recipe.dtype)


def _lower_onnx_native(
    traced: Traced,
    recipe: Recipe,
    weights: StoredWeights,
    folder: Path,
    tokenizer: Reader,
    progress: Progress,
) -> Graph:
    """``pocketslm.onnx`` over the ``model.slm`` that is there already."""
    from pocketslm.export.lower import onnx_native

    onnx_native.lower(traced.config, folder)
    return Graph("onnx-pocketslm", onnx_native.GRAPH_FILE, traced.context, "fp16")


def _lower_executorch(
    traced: Traced,
    recipe: Recipe,
    weights: StoredWeights,
    folder: Path,
    tokenizer: Reader,
    progress: Progress,
) -> Graph:
    """``model.pte``, which ExecuTorch's LLM runner takes with the ``tokenizer.json`` beside it."""
    bos, eos = _ends(tokenizer().identity)
    with without_warnings():
        from pocketslm.export.lower import executorch

        weights.notes += executorch.lower(
            traced,
            weights,
            folder / executorch.GRAPH_FILE,
            bos=bos,
            eos=eos,
            int8_cache=recipe.kv_cache == "int8",
            progress=lambda done, total: progress("lower to executorch", done / total),
        )
    cache = "int8" if recipe.kv_cache == "int8" else "fp32"
    return Graph("executorch", executorch.GRAPH_FILE, traced.context, cache)


def _lower_executorch_native(
    traced: Traced,
    recipe: Recipe,
    weights: StoredWeights,
    folder: Path,
    tokenizer: Reader,
    progress: Progress,
) -> Graph:
    """``pocketslm.pte``, with a copy of the ``model.slm`` that is there already."""
    bos, eos = _ends(tokenizer().identity)
    with without_warnings():
        from pocketslm.export.lower import executorch_native

        executorch_native.lower(
            traced.config,
            folder / "model.slm",
            folder / executorch_native.GRAPH_FILE,
            context=traced.context,
            bos=bos,
            eos=eos,
        )
    return Graph("executorch-pocketslm", executorch_native.GRAPH_FILE, traced.context, "fp16")


# In this order: a later one may use what an earlier one wrote.
_LOWERINGS = {
    "native": _lower_native,
    "onnx": _lower_onnx,
    "onnx-pocketslm": _lower_onnx_native,
    "executorch": _lower_executorch,
    "executorch-pocketslm": _lower_executorch_native,
}


def _ends(identity: Identity) -> tuple[int, list[int]]:
    """The token that begins a text, and those that end an answer.

    ExecuTorch's file has to name one of the first kind; where a model has none, its runners are
    told to begin with what they end with, which they do only when asked to.
    """
    first = identity.eos[0] if identity.eos else 0
    return first if identity.bos is None else identity.bos, list(identity.eos)
