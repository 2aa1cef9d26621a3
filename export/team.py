"""Processes that train one model together, as ``torchrun`` starts them.

Each has a copy of the model and a share of every batch; gradients are averaged
(DistributedDataParallel), over nccl between GPUs, over gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pocketslm.errors import ExportError, PocketSlmError, UsageError

_PATIENCE = timedelta(minutes=10)  # that one waits for another
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Team:
    """One of ``size`` processes, numbered ``rank``; by itself where size is 1.

    ``device``: what it computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch that is cut into as many."""
        count = len(batch) // self.size
        return batch[self.rank * count : (self.rank + 1) * count]

    def together(self, model: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the team, which begins as the leader's is."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Single numbers averaged over the team, without gradients."""
        together = torch.stack([value.detach() for value in values])
        if self.size > 1:
            dist.all_reduce(together)
            together /= self.size
        return list(together)

    def the_leaders(self, value: Any) -> Any:
        """What the leader has of a value that all have."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]


def alone() -> Team:
    """A process by itself, on a GPU where torch finds one."""
    return Team(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def joined() -> Iterator[Team]:
    """The team that this process was started in, until the block ends.

    Raises UsageError where the environment is not whole or there are fewer GPUs than processes, and
    ExportError where another process ends. Of all the processes one alone lets its error out; the
    others exit.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield alone()
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise UsageError(f"WORLD_SIZE is {size} without {missing[0]}; start with `torchrun`")
    try:
        yield _join()
    except (PocketSlmError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _lost(error):
            raise
        if not _first_to_say():
            raise SystemExit(1) from None
        if isinstance(error, PocketSlmError):
            raise
        raise ExportError(
            "another process of this run has ended; start the same command again, it goes on from "
            "its last checkpoint"
        ) from None
    finally:
        with suppress(RuntimeError, AssertionError, ValueError):  # it was never made, or is gone
            dist.destroy_process_group()


def _join() -> Team:
    rank, size, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= (count := torch.cuda.device_count()):
            raise UsageError(
                f"process {local + 1} of this node finds {count} GPUs; give torchrun "
                f"--nproc-per-node {count}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return Team(rank, size, device)


def _lost(error: RuntimeError) -> bool:
    """Whether an error is what is left of the others."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return "gloo" in text or "onnection" in text


def _first_to_say() -> bool:
    """Whether no other process of the team has failed before, as far as anyone can be asked."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=5)
        store = dist.TCPStore(address, port, None, False, wait)  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"pocketslm/failed/{attempt}", 1)) == 1
    except (dist.DistError, RuntimeError):
        return True
