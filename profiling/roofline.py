"""The speed of a model.slm beside the limits of this machine.

``python -m pocketslm.profiling.roofline MODEL.slm`` prints prompt and decode speed, every sample,
decoding as a share of the measured streaming bandwidth, prompts as a share of the int8 peak.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pocketslm.errors import PocketSlmError
from pocketslm.runtime.backends.native import KV_TYPES, NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import load_library


def samples_ns(run: Callable[[], None], prepare: Callable[[], None], repeats: int) -> list[int]:
    samples = []
    for _ in range(repeats):
        prepare()
        start = time.perf_counter_ns()
        run()
        samples.append(time.perf_counter_ns() - start)
    return samples


def prefill_once(session: NativeSession, prompt: npt.NDArray[np.int64]) -> None:
    session.forward(prompt)


def decode(session: NativeSession, count: int) -> None:
    token = 0
    for _ in range(count):
        token = session.step_greedy(token)


def measure(model: NativeModel, session: NativeSession, repeats: int) -> dict[str, object]:
    """Prompts of 512 tokens, and 64 new tokens at several depths of context."""
    info, library = model.info, load_library()
    prompt = np.random.default_rng(0).integers(0, info.vocab_size, 512)
    fresh = 64
    prefill = samples_ns(
        lambda: prefill_once(session, prompt), lambda: session.truncate(0), repeats
    )
    prefill_tps, decode_tps = 512e9 / statistics.median(prefill), dict[int, float]()
    result: dict[str, object] = {
        "isa": session.isa,
        "threads": session.threads,
        "kv": session.kv_type,
        "prefill_ns": prefill,
        "prefill_tps": prefill_tps,
    }
    for depth in (0, 512, 1984):
        if depth + fresh > session.context:
            continue
        session.truncate(0)
        for _ in range(0, depth, 512):
            session.forward(prompt[: min(512, depth - session.length)])
        rewind = functools.partial(session.truncate, depth)
        samples = samples_ns(functools.partial(decode, session, fresh), rewind, repeats)
        result[f"decode_{depth}_ns"] = samples
        decode_tps[depth] = fresh * 1e9 / statistics.median(samples)
        result[f"decode_{depth}_tps"] = decode_tps[depth]
    bandwidth = library.pslm_measure_bandwidth(session.threads, info.bytes_per_token)
    peak = library.pslm_measure_int8_peak(session.isa.encode(), session.threads)
    result |= {
        "bandwidth_gbs": bandwidth / 1e9,
        "decode_bandwidth_share": decode_tps[0] * info.bytes_per_token / bandwidth,
        "int8_peak_gmacs": peak / 1e9,
        "prefill_peak_share": prefill_tps * info.macs_per_token / peak,
    }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv", choices=list(KV_TYPES), default="fp16")
    parser.add_argument("--isa")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    try:
        model = NativeModel(args.model)
        context = min(2048, model.info.max_context)
        session = model.session(
            context=context, threads=args.threads, kv_type=args.kv, isa=args.isa
        )
        print(json.dumps(measure(model, session, args.repeats), indent=1))
    except PocketSlmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
