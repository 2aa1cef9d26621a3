"""Programs that have every feature of ``runtime/ops/program.h`` at least once."""

from __future__ import annotations

from collections.abc import Callable

from program_support import HIDDEN, Program, Scheme

from pocketslm.runtime.ops.ids import ATTEND

WINDOW = 24


def llama(p: Program) -> None:
    p.embed()
    for p.layer in range(2):
        p.attention()
        p.mlp()
    p.head(tied=True)


def gemma2(p: Program) -> None:
    """Both norms around each block, every other layer windowed, scores and logits capped."""
    p.embed(8.0)
    for p.layer in range(2):
        window = WINDOW if p.layer == 0 else 0
        p.attention(window=window, cap=2.0, after="rms", scale=0.2)
        p.mlp(activation="gelu_tanh", after="rms")
    p.head(tied=True, cap=3.0)


def gemma3(p: Program) -> None:
    """Norms of heads, two rotary tables, windows; values normalized without a weight."""
    p.embed(8.0)
    for p.layer in range(2):
        window, theta = (WINDOW, 100.0) if p.layer == 0 else (0, 5000.0)
        p.attention(head_norms=True, window=window, theta=theta, value_norm=True, after="rms")
        p.mlp(activation="gelu_tanh", after="rms")
    p.head()


def phi(p: Program) -> None:
    """Attention beside the MLP, from norms of their own; a layer norm with biases everywhere."""
    p.embed()
    for p.layer in range(2):
        p.attention(norm="layer", rope=8, bias=True, output=False)
        p.mlp(norm="layer", activation="gelu_tanh", gate=False, bias=True, output=False)
        p.product("attended", 64, bias=True)
        p.product("hidden", 96, bias=True)
    p.head(norm="layer", bias=True)


def granite(p: Program) -> None:
    """Scales of the embedding, the residual stream and the logits; no rotation in one layer."""
    p.embed(3.0)
    for p.layer in range(2):
        p.attention(residual=0.4, rope=16 if p.layer else 0, scale=0.1)
        p.mlp(residual=0.4)
    p.head(factor=0.25)


def olmo(p: Program) -> None:
    """Norms only after the blocks, and of all of query and key."""
    p.embed()
    for p.layer in range(2):
        p.attention(norm="none", wide_norms=True, after="rms")
        p.mlp(norm="none", after="rms")
    p.head()


def bitnet(p: Program) -> None:
    """Norms inside the blocks, squared ReLU."""
    p.embed()
    for p.layer in range(2):
        p.attention(inner_norm=True)
        p.mlp(activation="relu2", inner_norm=True)
    p.head()


def hunyuan(p: Program) -> None:
    """Norms of heads after the rotation; a factor of cosines; a temperature of the query."""
    flags = ATTEND["norm_after_rope"]
    p.embed()
    for p.layer in range(2):
        p.attention(head_norms=True, flags=flags, temperature=(0.3, 16))
        p.mlp(activation="relu", gate=False)
    p.attention(factor=1.2)
    p.head()


def lfm(p: Program) -> None:
    """Short convolutions between attention."""
    p.embed()
    p.layer = 0
    p.convolution(3)
    p.mlp()
    p.layer = 1
    p.attention(head_norms=True)
    p.mlp()
    p.convolution(4, bias=True)
    p.head()


def gemma4(p: Program) -> None:
    """Layers of other shapes, and some that read what another has stored."""
    p.embed()
    p.layer = 0
    p.attention(4, 2, 16, window=WINDOW)
    p.mlp(64)
    p.layer = 1
    p.attention(2, 1, 32, rope=8)
    p.mlp(96)
    p.layer = 2
    p.attention(4, 2, 16, window=WINDOW, shared=0, head_norms=True)
    p.mlp(128)
    p.layer = 3
    p.attention(14, 1, 32, shared=1)
    p.mlp(32)
    p.head()


def mistral(p: Program) -> None:
    """A window in every layer, many query heads to one of keys."""
    p.embed()
    for p.layer in range(2):
        p.attention(14, 1, 16, window=WINDOW if p.layer else 5)
        p.mlp()
    p.head()


def bert(p: Program) -> None:
    """An encoder: learned positions, norms of the stream itself, every token sees all."""
    p.embed(positions=True)
    p.normalize("residual", HIDDEN, HIDDEN, "layer")
    for p.layer in range(2):
        p.attention(norm="none", rope=0, bias=True, flags=ATTEND["bidirectional"])
        p.normalize("residual", HIDDEN, HIDDEN, "layer")
        p.mlp(norm="none", activation="gelu", gate=False, bias=True)
        p.normalize("residual", HIDDEN, HIDDEN, "layer")
    p.head(norm="none", matrix=False)


def embedding_gemma(p: Program) -> None:
    """An encoder with windows to both sides."""
    p.embed(8.0)
    for p.layer in range(2):
        window = WINDOW if p.layer == 0 else 0
        p.attention(window=window, flags=ATTEND["bidirectional"], head_norms=True, after="rms")
        p.mlp(activation="gelu_tanh", after="rms")
    p.head(matrix=False)


DECODERS: dict[str, Callable[[Program], None]] = {
    case.__name__: case
    for case in (
        *(llama, gemma2, gemma3, phi, granite, olmo, bitnet, hunyuan, lfm, gemma4, mistral),
    )
}
ENCODERS: dict[str, Callable[[Program], None]] = {
    case.__name__: case for case in (bert, embedding_gemma)
}
CASES = DECODERS | ENCODERS


def program(name: str, scheme: Scheme = lambda values: values, context: int = 640) -> Program:
    made = Program(layers=4, scheme=scheme, context=context)
    CASES[name](made)
    return made
