"""Quality of a bundle against the checkpoint it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pocketslm.errors import CheckpointError, UsageError
from pocketslm.export.pipeline import update_manifest
from pocketslm.export.prune.vocabulary import parse_ranges
from pocketslm.export.text import read_text
from pocketslm.models.catalog import catalog, fetch
from pocketslm.models.checkpoint import Checkpoint, checkpoint_sha256, open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import Session, open_session
from pocketslm.runtime.bundle import Manifest, open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """What ``pocketslm eval`` measured.

    Windows of ``window`` tokens stand beside each other (no overlap), each from an empty cache;
    ``tokens`` positions in all. perplexity and source_perplexity are over all positions but each
    window's first, which has nothing before it. kl: mean over all positions of
    KL(source || bundle) in nats; top1: share of positions where both put the same token first.
    source: the name of the checkpoint it was held against.
    """

    perplexity: float
    source_perplexity: float
    kl: float
    top1: float
    tokens: int
    window: int
    backend: str
    corpus: str
    corpus_sha256: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_bundle(
    folder: Path,
    *,
    source: Checkpoint | None,
    text: Path,
    window: int = 512,
    windows: int = 16,
    backend: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Measure a bundle against its source and write the result into its manifest.

    ``source``: the checkpoint, or one that it was pruned or healed from; None looks for their
    SHA-256s in the catalog. The text is tokenized from its start, as far as the windows reach.
    Raises UsageError where source or text do not fit or the model gives embeddings, and what
    opening them raises.
    """
    bundle = open_bundle(folder)
    if bundle.manifest is None or bundle.config is None:
        raise UsageError(f"{folder} was not made by pocketslm: there is no source to compare with")
    bundle.config.need_head("eval")
    checkpoint = source or open_checkpoint(_source_in_catalog(bundle.manifest))
    if checkpoint_sha256(checkpoint) not in _origins(bundle.manifest):
        raise UsageError(f"{checkpoint.path} is not what {folder} was made from (SHA-256 differs)")
    # Eight characters a token are more than enough; the rest need not be tokenized.
    content = read_text(text)[: 8 * window * windows]
    ids = load_tokenizer(folder).encode(content)
    session = open_session(bundle, backend, threads, context=min(window, bundle.context))
    vocabulary = bundle.manifest.recipe.get("vocabulary")
    quality = evaluate(
        checkpoint,
        session,
        windows_of(ids, window, windows),
        text,
        progress,
        kept=None if vocabulary is None else parse_ranges(vocabulary),
    )
    update_manifest(folder, replace(bundle.manifest, quality=quality.to_dict()))
    return quality


def _origins(manifest: Manifest) -> list[str]:
    """SHA-256s of the bundle's source and of what that was made from, nearest first."""
    return [manifest.source["sha256"], *manifest.source.get("made_from", [])]


def _source_in_catalog(manifest: Manifest) -> Path:
    names = {entry.sha256: entry.name for entry in catalog().values()}
    for sha256 in _origins(manifest):
        if sha256 in names:
            return fetch(names[sha256])
    raise UsageError("the catalog does not have the bundle's source; give it with --source")


def windows_of(ids: Sequence[int], window: int, count: int) -> list[Ids]:
    """The first ``count`` windows of ``window`` ids; UsageError where there is not even one."""
    if window < 2:
        raise UsageError(f"window {window}, expected at least 2 tokens")
    whole = min(count, len(ids) // window)
    if whole < 1:
        raise UsageError(f"the text has {len(ids)} tokens, expected at least one window: {window}")
    array = np.asarray(ids[: whole * window], np.int64)
    return list(array.reshape(whole, window))


def evaluate(
    checkpoint: Checkpoint,
    session: Session,
    windows: Sequence[Ids],
    text: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: Sequence[int] | None = None,
) -> Quality:
    """Run the source in fp32 and the bundle over the same windows of ``text``'s tokens.

    ``progress`` is called with windows done and in total. ``kept``: the source's ids of the tokens
    that the bundle has; the source is then held to them, too. Raises UsageError where the
    vocabularies differ, ContextOverflowError where a window is longer than the graph's context,
    BackendError or CheckpointError where the bundle's or the source's logits are not finite.
    """
    if session.vocab_size != (len(kept) if kept else checkpoint.config.vocab_size):
        raise UsageError(
            f"the bundle has a vocabulary of {session.vocab_size}, the source "
            f"{checkpoint.config.vocab_size}: was the bundle made from {checkpoint.path}?"
        )
    window = len(windows[0])
    reference = load_reference(checkpoint, context=window)
    index = None if kept is None else np.array(kept)
    sums = np.zeros(4)  # negative log-likelihood of source and bundle, KL, agreements
    for done, ids in enumerate(windows, 1):
        with torch.no_grad():
            source_ids = ids if index is None else index[ids]
            logits, _ = reference(torch.from_numpy(source_ids)[None], reference.empty_cache())
        if index is not None:
            logits = logits[:, :, index]
        session.truncate(0)
        sums += compare(logits[0], torch.from_numpy(session.forward(ids, all_logits=True)), ids)
        if not np.isfinite(sums).all():  # the session has refused its own
            raise CheckpointError(
                f"{checkpoint.path}: its logits are not finite, so that there is nothing to "
                "compare with; its weights are damaged"
            )
        progress(done, len(windows))
    positions = window * len(windows)
    source_nll, nll, kl, agreements = sums
    predicted = positions - len(windows)
    return Quality(
        perplexity=float(np.exp(nll / predicted)),
        source_perplexity=float(np.exp(source_nll / predicted)),
        kl=float(kl / positions),
        top1=float(agreements / positions),
        tokens=positions,
        window=window,
        backend=session.backend,
        corpus=text.name,
        corpus_sha256=hashlib.sha256(text.read_bytes()).hexdigest(),
        source=checkpoint.name,
    )


def compare(source: torch.Tensor, bundle: torch.Tensor, ids: Ids) -> npt.NDArray[np.float64]:
    """Sums over one window of logits [S, V]: both log-likelihoods (negative), KL, agreements.

    Log-softmax in fp64: a KL of 1e-3 nats is a small difference of large sums. A few positions at
    a time: those of a whole window are hundreds of megabytes that no cache holds.
    """
    sums = np.zeros(4)
    for start in range(0, len(ids), 64):
        rows = slice(start, start + 64)
        p = torch.log_softmax(source[rows].double(), -1)
        q = torch.log_softmax(bundle[rows].double(), -1)
        following = torch.from_numpy(ids[start + 1 : start + 65])[:, None].to(p.device)
        parts = (
            -p[: len(following)].gather(1, following).sum(),
            -q[: len(following)].gather(1, following).sum(),
            (p.exp() * (p - q)).sum(),
            (p.argmax(-1) == q.argmax(-1)).sum(),
        )
        sums += [float(part) for part in parts]
    return sums
