"""Runtimes to measure beside ours, each driven through its own Python interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketslm.errors import BackendError, UsageError
from pocketslm.profiling.engine import Peer
from pocketslm.profiling.peers.executorch import ExecuTorch
from pocketslm.profiling.peers.llama_cpp import LlamaCpp
from pocketslm.profiling.peers.ort_genai import OrtGenai

_ALL: tuple[Peer, ...] = (OrtGenai(), LlamaCpp(), LlamaCpp("Q4_0"), ExecuTorch())
ALL = "all"
PEERS = {peer.name: peer for peer in _ALL}


def peer_named(name: str) -> Peer:
    """Raises UsageError for an unknown name."""
    if name not in PEERS:
        raise UsageError(f"peer {name!r} is unknown, expected one of: {', '.join(PEERS)}")
    return PEERS[name]


def parse_peer(text: str) -> tuple[Peer, Path | None]:
    """Read ``NAME`` or ``NAME=ARTEFACT``. Raises UsageError for anything else."""
    name, has_path, path = text.partition("=")
    if name not in PEERS or (has_path and not path):
        raise UsageError(
            f"peer {text!r} is not understood, expected NAME or NAME=ARTEFACT with one of: "
            + ", ".join(f"{peer.name} ({peer.artefact})" for peer in _ALL)
        )
    return PEERS[name], Path(path) if path else None


def choose_peers(texts: Sequence[str]) -> list[tuple[Peer, Path | None, bool]]:
    """The peers with their artefacts, and whether "all" chose them.

    Raises BackendError for a named peer that cannot run here, UsageError for an unknown one.
    """
    named = [parse_peer(text) for text in texts if text != ALL]
    for peer, _ in named:
        if reason := peer.available():
            raise BackendError(f"peer {peer.name}: {reason}")
    chosen = [(peer, path, False) for peer, path in named]
    if ALL in texts:
        names = {peer.name for peer, _ in named}
        chosen += [(peer, None, True) for peer in _ALL if peer.name not in names]
    return chosen
