"""Where a family's files keep the weights, and how they differ from ours.

Our names are those of Hugging Face's Llama, with these beside them in a layer: ``self_attn.q_norm``
and ``k_norm``, ``attention_post_norm`` and ``mlp_post_norm`` for norms after a block,
``conv.b_proj``, ``c_proj``, ``x_proj``, ``out_proj`` and ``conv.taps`` for a short convolution; and
at the top ``model.embed_positions`` and ``model.embed_norm``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pocketslm.errors import CheckpointError
from pocketslm.models.config import Attention, ModelConfig
from pocketslm.models.tensors import Array, QuantTensor, Weight, floats

Read = Callable[[str], Weight]
_NAME = re.compile(r"(model\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?$")


@dataclass(frozen=True)
class WeightMap:
    """One form of file of one family.

    top, parts: our name -> theirs, outside the layers and within one, without ``.weight``.
    layer: what stands before a layer's names, with ``{}`` for its number.
    fused: their name -> our parts whose rows it stacks.
    interleaved: the fused rows alternate between the parts, a head at a time (GPT-NeoX).
    pairs: our parts whose rows lie as rotary pairs (x0, y0, x1, y1, ...), not as halves.
    norm_offset: what their norm weights lack to ours.
    transposed: matrices lie as [in, out] (GPT-2's Conv1D).
    flat_taps: the taps of a convolution lie as [channels, taps], not [channels, 1, taps].
    ignored: patterns of their names that hold nothing a model needs.
    """

    top: Mapping[str, str]
    layer: str
    parts: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    pairs: tuple[str, ...] = ()
    norm_offset: float = 0.0
    transposed: bool = False
    flat_taps: bool = False
    ignored: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[int | None, str, str]:
        """Our name as layer, part and suffix."""
        match = _NAME.fullmatch(name)
        assert match is not None
        return None if match[2] is None else int(match[2]), match[3], match[4] or ""

    def stored(self, name: str) -> str:
        """Their name of the tensor that holds our ``name``."""
        layer, part, suffix = self.split(name)
        if layer is None:
            return self.top[part] + suffix
        for whole, parts in self.fused.items():
            if part in parts:
                return self.layer.format(layer) + whole + suffix
        return self.layer.format(layer) + self.parts[part] + suffix

    def read(self, name: str, config: ModelConfig, read: Read) -> Weight:
        """Our tensor ``name``, made from theirs."""
        layer, part, _ = self.split(name)
        weight = read(self.stored(name))
        if layer is None:
            return self._shifted(part, weight)
        if self.transposed and len(weight.shape) == 2 and part.endswith("_proj"):
            weight = np.ascontiguousarray(floats(weight).T)
        for parts in self.fused.values():
            if part in parts:
                rows = self._fused_rows(config, layer, parts)
                self._check_rows(name, weight, sum(map(len, rows)))
                weight = _rows(weight, rows[parts.index(part)])
        if part in self.pairs:
            self._check_rows(name, weight, _row_count(config, layer, part))
            weight = _rows(weight, _halves(_heads(config, layer, part), weight.shape[0]))
        if part == "conv.taps":  # [channels, 1, taps] in a Conv1d
            weight = floats(weight).reshape(weight.shape[0], -1)
        return self._shifted(part, weight)

    def _check_rows(self, name: str, weight: Weight, rows: int) -> None:
        """Raises CheckpointError: of more rows than are taken, the wrong ones would be."""
        if not weight.shape or weight.shape[0] != rows:
            raise CheckpointError(
                f"{self.stored(name)} has shape {tuple(weight.shape)}, expected {rows} rows from "
                "the config; is this the right config for these weights?"
            )

    def write(self, config: ModelConfig, state: Mapping[str, Array]) -> dict[str, Array]:
        """All of our tensors under their names and in their form: the inverse of :meth:`read`."""
        written: dict[str, Array] = {}
        stacked: dict[str, list[tuple[Array, Array]]] = {}
        for name, array in state.items():
            layer, part, suffix = self.split(name)
            if self.norm_offset and _is_norm(part) and suffix == ".weight":
                array = array - np.float32(self.norm_offset)
            if layer is not None and part in self.pairs:
                order = _halves(_heads(config, layer, part), len(array))
                back = np.empty_like(order)
                back[order] = np.arange(len(order))
                array = array[back]
            if part == "conv.taps" and not self.flat_taps:
                array = array[:, None]
            fused = next((parts for parts in self.fused.values() if part in parts), None)
            if layer is not None and fused is not None:
                rows = self._fused_rows(config, layer, fused)[fused.index(part)]
                stacked.setdefault(self.stored(name), []).append((rows, array))
                continue
            if self.transposed and layer is not None and array.ndim == 2 and part != "conv.taps":
                array = np.ascontiguousarray(array.T)
            written[self.stored(name)] = np.ascontiguousarray(array)
        for name, pieces in stacked.items():
            count = sum(len(rows) for rows, _ in pieces)
            whole = np.empty((count, *pieces[0][1].shape[1:]), pieces[0][1].dtype)
            for rows, array in pieces:
                whole[rows] = array
            if self.transposed and whole.ndim == 2:
                whole = np.ascontiguousarray(whole.T)
            written[name] = whole
        return written

    def unread(
        self,
        names: Iterable[str],
        parameters: Iterable[str],
        rename: Callable[[str], str] = lambda name: name,
    ) -> list[str]:
        """Those of a file's ``names`` that none of our ``parameters`` is made from.

        rename: a name of the family's as this file has it.
        """
        used = {rename(self.stored(name)) for name in parameters}
        return sorted(
            name
            for name in names
            if name not in used and not any(re.search(p, name) for p in self.ignored)
        )

    def _shifted(self, part: str, weight: Weight) -> Weight:
        if not self.norm_offset or not _is_norm(part):
            return weight
        shifted: Array = floats(weight) + np.float32(self.norm_offset)
        return shifted

    def _fused_rows(self, config: ModelConfig, layer: int, parts: tuple[str, ...]) -> list[Array]:
        """The rows of a fused tensor that each part owns, in the part's own order."""
        counts = [_row_count(config, layer, part) for part in parts]
        if not self.interleaved:
            ends = np.cumsum([0, *counts])
            return [np.arange(a, b) for a, b in pairwise(ends)]
        heads = _heads(config, layer, parts[0])
        lanes = np.arange(sum(counts)).reshape(heads, len(parts), -1)
        return [lanes[:, index].reshape(-1) for index in range(len(parts))]


def _is_norm(part: str) -> bool:
    return part.endswith("norm")


def _rows(weight: Weight, index: Array) -> Weight:
    return weight.rows(index) if isinstance(weight, QuantTensor) else weight[index]


def _halves(heads: int, rows: int) -> Array:
    """For each row in halves order, the row in pairs order that it is."""
    order: Array = np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)
    return order


def _attention(config: ModelConfig, layer: int) -> Attention:
    attention = config.stored_layers[layer].attention
    assert attention is not None
    return attention


def _heads(config: ModelConfig, layer: int, part: str) -> int:
    attention = _attention(config, layer)
    return attention.heads if part.startswith("self_attn.q") else attention.kv_heads


def _row_count(config: ModelConfig, layer: int, part: str) -> int:
    """Rows of one of our matrices in a layer."""
    if part.startswith("mlp."):
        return config.stored_layers[layer].mlp.width
    if part.startswith("conv."):
        return config.hidden_size
    attention = _attention(config, layer)
    return attention.query_width if part == "self_attn.q_proj" else attention.kv_width
