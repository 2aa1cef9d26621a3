"""Which matrices of a layer read what, and which of their rows and columns belong together.

Quantization, pruning, healing and size estimates ask here; none of them names a weight itself.
Names are those of :mod:`pocketslm.models.architectures.weights`, within a layer and without
``.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketslm.models.config import Layer, ModelConfig

# What rows or columns count: channels of the residual stream, query heads, key-value heads, neurons
# of an MLP.
Axis = Literal["channels", "queries", "values", "neurons"]
LAYERS = "model.layers."


@dataclass(frozen=True)
class Site:
    """Matrices that read the same input.

    norm: the norm that makes this input for them alone; None: it is made otherwise.
    rows, columns: what their rows and columns are. Query rows stand for those of keys and values.
    """

    matrices: tuple[str, ...]
    norm: str | None
    rows: Axis
    columns: Axis

    @property
    def name(self) -> str:
        return self.matrices[0]


def sites(layer: Layer) -> tuple[Site, ...]:
    """The sites of a layer, in the order in which they run."""
    before = layer.norms in ("pre", "both", "parallel2")
    mixer_norm = "input_layernorm" if before else None
    mlp_norm = "post_attention_layernorm" if before else None
    inner = ("mlp.gate_proj", "mlp.up_proj") if layer.mlp.gated else ("mlp.up_proj",)
    if layer.attention is not None:
        reads = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        mixer = (
            Site(reads, mixer_norm, "queries", "channels"),
            Site(("self_attn.o_proj",), None, "channels", "queries"),
        )
    else:
        reads = ("conv.b_proj", "conv.c_proj", "conv.x_proj")
        mixer = (
            Site(reads, mixer_norm, "channels", "channels"),
            Site(("conv.out_proj",), None, "channels", "channels"),
        )
    return (
        *mixer,
        Site(inner, mlp_norm, "neurons", "channels"),
        Site(("mlp.down_proj",), None, "channels", "neurons"),
    )


def is_rounded(name: str) -> bool:
    """Whether a parameter is a matrix that may be quantized: of a site, embedding or head.

    Learned positions and the taps of a convolution are tables of floats.
    """
    return not name.endswith((".embed_positions.weight", ".conv.taps.weight"))


def matrices(layer: Layer) -> list[str]:
    """All matrices of a layer."""
    return [name for site in sites(layer) for name in site.matrices]


def layer_matrices(config: ModelConfig) -> list[tuple[str, ...]]:
    """Full names of the matrices of each site of each stored layer."""
    return [
        tuple(f"{LAYERS}{index}.{name}.weight" for name in site.matrices)
        for index, layer in enumerate(config.stored_layers)
        for site in sites(layer)
    ]


def axes(layer: Layer, part: str) -> tuple[Axis | None, Axis | None]:
    """What the rows and columns of a parameter of a layer are; None: neither, or there are none."""
    if part in ("self_attn.q_norm", "self_attn.k_norm"):
        if layer.attention is None or layer.attention.qk_norm != "full":
            return None, None
        return ("queries" if part.endswith("q_norm") else "values"), None
    for site in sites(layer):
        if part in site.matrices:
            of_values = part in ("self_attn.k_proj", "self_attn.v_proj")
            return "values" if of_values else site.rows, site.columns
    return "channels", None  # norms, and the taps of a convolution
