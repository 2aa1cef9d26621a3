"""What the package itself keeps for a later run: prefixes, choices, losses, results, trainings."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np

from . import mutate
from .target import Mutators, Target

PREFIX_TOKENS = np.arange(50, dtype=np.int32) % 90


def prefix_state(adapter: str) -> Any:
    from pocketslm.runtime.prefixes import Identity, State

    return State(Identity("model", adapter, "engine", False), PREFIX_TOKENS, bytes(range(256)))


def _prefix(data: bytes, rng: Random) -> bytes:
    """Changes of a prefix's header or numbers; half of them with a checksum that fits."""
    line, _, rest = data.partition(b"\n")
    if rng.random() < 0.5:
        return mutate.binary(data, rng, 400)
    with suppress(ValueError):
        header = json.loads(mutate.json_tree(line, rng) if rng.random() < 0.7 else line)
        rest = mutate.binary(rest, rng)
        if isinstance(header, dict) and isinstance(count := header.get("tokens"), int):
            tokens, state = rest[: 4 * count], rest[4 * count :]
            sizes = f"{count} {len(state)}".encode()
            header |= {"bytes": len(state)}
            header["crc32"] = zlib.crc32(state, zlib.crc32(tokens, zlib.crc32(sizes)))
        return json.dumps(header).encode("utf-8", "replace") + b"\n" + rest
    return data


class PrefixFiles(Target):
    """A folder of prompts' states, for the base and for an adapter: one is whole, and of the
    adapter that was asked for, or there is none."""

    name = "prefix"
    covers = ("runtime/prefixes.py",)
    mutators: ClassVar[Mutators] = {"": _prefix}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.errors import UsageError
        from pocketslm.runtime.prefixes import Prefixes

        folder = self.scratch / "prefixes"
        folder.mkdir(exist_ok=True)
        (folder / Path(name).name).write_bytes(content)
        store = Prefixes(folder)
        found = {}
        for adapter in ("", "polite"):
            wanted = prefix_state(adapter)
            state = store.find(wanted.identity, wanted.tokens, 1)
            if state is not None:
                assert state.identity == wanted.identity
                assert state.serves(wanted.tokens) >= 1
                found[adapter] = bytes(state.data)
        store.keep(prefix_state("polite"))
        for path in folder.iterdir():
            path.unlink()
        if not found:
            raise UsageError("no prefix was found")


class KeptFiles(Target):
    """Files from which a later command goes on."""

    name = "kept"
    covers = ("export/bits.py", "export/methods.py", "export/heal.py", "runtime/cores.py")
    mutators: ClassVar[Mutators] = {
        "losses": mutate.json_tree,
        "results": mutate.json_lines,
        "threads.json": mutate.json_tree,
        "generation_config.json": mutate.json_tree,
        "state": partial(mutate.binary, end=3000),
    }

    def __init__(self, home: Path, scratch: Path) -> None:
        super().__init__(home, scratch)
        self.known = json.loads((home / "known.json").read_text())
        self.costs = {
            tuple(site): {int(bits): cost for bits, cost in by_bits.items()}
            for site, by_bits in self.known["costs"]
        }

    def feed(self, name: str, content: bytes) -> None:
        path = self.scratch / name
        path.write_bytes(content)
        getattr(self, f"_{name.partition('.')[0]}")(path)

    def _losses(self, path: Path) -> None:
        from pocketslm.export import bits
        from pocketslm.export.quantize.sensitivity import allocate

        found = bits._read(path, self.known["identity"], self.costs)
        assert found is not None
        room = sum(max(cost.values()) for cost in self.costs.values()) * 2 // 3
        allocate(found, self.costs, room)

    def _results(self, path: Path) -> None:
        from pocketslm.export import bits, methods

        found = methods._read(path, self.known["identity"])
        methods.markdown(list(found.values()))
        bits.chart(list(found.values()))

    def _threads(self, path: Path) -> None:
        from pocketslm.runtime.cores import choice_here, read_choices

        choice_here(path.parent)
        read_choices(path.parent)

    def _generation_config(self, path: Path) -> None:
        from pocketslm.runtime.config import generation_defaults

        generation_defaults(path.parent)

    def _state(self, path: Path) -> None:
        import torch

        from pocketslm.export.heal import HealConfig, _Run
        from pocketslm.export.team import alone
        from pocketslm.models.checkpoint import open_checkpoint

        torch.set_num_threads(1)
        if not hasattr(self, "run_"):
            model = open_checkpoint(self.home / "hf")
            config = HealConfig(steps=2, batch=1, sequence=16)
            self.run_ = _Run(model, model, config, alone())
        self.run_.restore(path, self.known["run"])


TARGETS = (PrefixFiles, KeptFiles)
