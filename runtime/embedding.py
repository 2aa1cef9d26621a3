"""Embeddings: a text's tokens in, one vector out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from pocketslm.errors import BackendError, BundleError, ContextOverflowError, UsageError
from pocketslm.models.config import Pooling
from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends import Session
from pocketslm.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt

Vector: TypeAlias = "npt.NDArray[np.float32]"


def tokens_of(
    text: str, number: int, tokenizer: Tokenizer, pooling: Pooling, context: int, *, truncate: bool
) -> list[int]:
    """The tokens of a text, including those that the tokenizer adds.

    ``number`` names the text in messages. With ``truncate``, a text that is too long is cut to its
    first tokens; otherwise it raises ContextOverflowError. Raises UsageError for a text without
    tokens.
    """
    most = min(pooling.max_tokens or context, context)
    room = most - len(tokenizer.affixes)
    ids = tokenizer.encode(text.lower() if pooling.lowercase else text)
    if len(ids) > room and not truncate:
        raise ContextOverflowError(
            f"text {number} has {len(ids)} tokens, the model reads {room} of a text; split it, or "
            "let its first tokens stand for it (--truncate)"
        )
    found = tokenizer.with_affixes(ids[: max(room, 0)])
    if not found or room < 1:
        raise UsageError(f"text {number} has no tokens that the model reads, expected at least one")
    return found


def cosines(vectors: Vector) -> Vector:
    """The cosines [n - 1] between the first embedding of [n, size] and each other one."""
    lengths = np.linalg.norm(vectors, axis=1)
    found: Vector = vectors[1:] @ vectors[0] / (lengths[1:] * lengths[0])
    return found


def embed(session: Session, ids: Sequence[int], pooling: Pooling, size: int) -> Vector:
    """The embedding [size] of a text's tokens; the session must be empty.

    Raises BundleError where the graph gives another size, BackendError where the embedding is not
    finite or has no direction.
    """
    tokens = np.asarray(ids, np.int64)
    states = session.forward(tokens, all_logits=pooling.kind != "last")
    vector: Vector = states.mean(0) if pooling.kind == "mean" else states[0]
    if vector.size != size:
        raise BundleError(
            f"{session.backend}: the graph gives {vector.size} values a token, the manifest says "
            f"{size}; export the model again"
        )
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or (pooling.normalize and length == 0):
        raise BackendError(
            f"{session.backend}: the embedding is not finite, or zero: the weights are damaged"
        )
    return vector / np.float32(length) if pooling.normalize else vector
