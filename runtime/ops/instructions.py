"""Instructions per decoded token on aarch64, counted by qemu: what a phone's CPU will be given.

``python -m pocketslm.runtime.ops.instructions MODEL.slm`` builds ``pocketslm-run`` for aarch64 and
runs it on each kernel path. Needs ``qemu-aarch64`` with plugins (Debian: ``qemu-user``).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pocketslm.errors import BackendError, PocketSlmError
from pocketslm.runtime.ops import build

PATHS = ("neon_i8mm", "neon_dotprod", "scalar")
PROMPT = "Once upon a time"


def build_plugin(output: Path) -> Path:
    """The counting plugin, for the machine that qemu runs on."""
    command = (*build.find_toolchain().command, "-x", "c", "-O2", "-shared", "-fPIC")
    build.run([*command, str(build.SOURCES / "qemu_count.c"), "-o", str(output)])
    return output


def count(runner: Path, plugin: Path, model: Path, isa: str, tokens: int) -> int:
    """Instructions of a whole run that generates so many tokens."""
    qemu = shutil.which("qemu-aarch64")
    if qemu is None:
        raise BackendError("qemu-aarch64 is not installed; `apt-get install qemu-user`")
    command = [qemu, "-cpu", "max", "-plugin", str(plugin), str(runner), str(model)]
    options = ["-p", PROMPT, "-n", str(tokens), "-t", "1", "--context", "64", "--isa", isa]
    done = subprocess.run([*command, *options], capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    found = re.search(r"^instructions: (\d+)$", said, re.MULTILINE)
    if done.returncode != 0 or found is None:
        raise BackendError(f"{isa} under qemu failed: {said.strip()[-300:]}")
    if f"{tokens} new at" not in said:
        raise BackendError(f"the model did not generate {tokens} tokens after {PROMPT!r}: {said}")
    return int(found[1])


def per_token(runner: Path, plugin: Path, model: Path, isa: str, more: int) -> float:
    """Instructions that each further token costs."""
    few, many = (count(runner, plugin, model, isa, tokens) for tokens in (1, 1 + more))
    return (many - few) / more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2, help="tokens to count over (2)")
    parser.add_argument("--isa", choices=PATHS, action="append", help="only these paths")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            runner = build.build_runner(Path(folder) / "pocketslm-run", "aarch64-linux")
            plugin = build_plugin(Path(folder) / "qemu_count.so")
            paths = args.isa or PATHS
            counts = {isa: per_token(runner, plugin, args.model, isa, args.tokens) for isa in paths}
    except (PocketSlmError, build.BuildError) as error:
        print(error, file=sys.stderr)
        return 2
    most = max(counts.values())
    for isa, instructions in counts.items():
        part = f"1/{most / instructions:.1f} of the most"
        print(f"{isa:<13}{instructions / 1e6:10.2f} M instructions a token   {part}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
