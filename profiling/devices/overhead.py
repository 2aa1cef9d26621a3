"""The cost of measuring: tokens/s with the sensors polled, against the bare runner.

``python -m pocketslm.profiling.devices.overhead BUNDLE --device adb`` loads the runner once and
decodes in turns with and without a sampler. It polls twenty times as often as a benchmark does, so
that a cost far below the noise of a machine becomes visible: each poll costs the same, and the
figure for one poll a second is a twentieth. Both are printed with their 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from pocketslm.errors import PocketSlmError
from pocketslm.profiling.devices import open_device
from pocketslm.profiling.devices.device import Device
from pocketslm.profiling.devices.info import read_machine
from pocketslm.profiling.devices.runner import RunnerProcess, install
from pocketslm.profiling.sensors.sampler import Sampler, read_sensors
from pocketslm.runtime.bundle import open_bundle

EVERY_S = 0.05  # a benchmark polls every 1 s
_RESAMPLES = 10_000


def measure(
    device: Device, bundle: Path, tokens: int, rounds: int, interval_s: float, threads: int
) -> list[tuple[int, int]]:
    """(bare, polled) nanoseconds of ``tokens`` decoded tokens, for each round."""
    machine, seen = read_machine(device), read_sensors(device)
    opened = open_bundle(bundle, verify=False)
    model = opened.path / opened.graph("native").file
    path = install(device, machine, model, lambda step, part: None)
    found = []
    with RunnerProcess(device, 600.0) as runner:
        runner.ask("load", path=path, threads=threads, context=tokens)

        def sampler() -> Sampler:
            return Sampler(device, seen, machine.clusters, runner.pid, interval_s)

        def once(polled: bool) -> int:
            with sampler() if polled else nullcontext():
                answer = runner.ask("bench", prompt_tokens=0, new_tokens=tokens, repeats=1)
            return int(answer["decode_ns"][0])

        once(polled=False)
        for index in range(rounds):
            # Alternate the order, so that a steady drift favours neither.
            order = (False, True) if index % 2 == 0 else (True, False)
            times = {polled: once(polled) for polled in order}
            found.append((times[False], times[True]))
    return found


def interval(pairs: list[tuple[int, int]]) -> tuple[float, float, float]:
    """(median, low, high) of polled over bare tokens/s, by a bootstrap over rounds with seed 0."""
    ratios = np.array([bare / polled for bare, polled in pairs])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="local")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=200)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--interval", type=float, default=EVERY_S, help="seconds between polls")
    args = parser.parse_args()
    try:
        with open_device(args.device) as device:
            pairs = measure(
                device, args.bundle, args.tokens, args.rounds, args.interval, args.threads
            )
    except PocketSlmError as error:
        print(error, file=sys.stderr)
        return 2
    median, low, high = interval(pairs)
    speed = float(np.median([args.tokens * 1e9 / bare for bare, _ in pairs]))
    print(
        f"{args.tokens} tokens, {args.threads} threads, {len(pairs)} rounds: bare {speed:.1f} tok/s"
        f", polled every {args.interval:g} s {median:.4f} of that (95 %: {low:.4f} .. {high:.4f})"
    )
    cost, least, most = (100 * args.interval * (1 - ratio) for ratio in (median, high, low))
    print(f"polled once a second: a cost of {cost:.3f} % (95 %: {least:.3f} .. {most:.3f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
