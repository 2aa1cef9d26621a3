"""What a server makes of several clients at once, ours beside llama-cpp-python's.

    python -m pocketslm.profiling.serving out/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Both servers run on this machine, on a model of the same weights, and take turns: in each round
every number of clients asks each server, and each client its own question, which the server has
not answered before. Answers are streamed and of a fixed length. Printed are, over all rounds, the
tokens a second of all clients, and the times to the first token and between two tokens.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Barrier

from pocketslm.errors import BackendError, PocketSlmError
from pocketslm.profiling.records import percentile
from pocketslm.profiling.tables import md_table
from pocketslm.runtime.backends import usable_cores
from pocketslm.terminal import numbers, show

WAIT_S = 120.0  # for a server to start, and for a token
KINDS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Give me five ideas for a talk about {}.",
    "Write a poem about {}.",
    "What should I know about {}?",
)
SUBJECTS = (
    *("a lighthouse", "bicycles", "rice", "the sea", "old maps", "dogs", "thunder", "bread"),
    *("the moon", "trains", "honey", "winter", "clocks", "rivers", "a library", "glass"),
    *("volcanoes", "gardens", "chess", "whales", "paper", "bridges", "markets", "the wind"),
)
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 1}  # as llama.cpp does
GREEDY = {"temperature": 0.0}


MOST_QUESTIONS = math.lcm(len(KINDS), len(SUBJECTS))  # then they begin again


def question(number: int) -> str:
    return KINDS[number % len(KINDS)].format(SUBJECTS[number % len(SUBJECTS)])


@dataclass
class Taken:
    """What clients measured: nanoseconds; ``tokens`` counts what the server says that it made, or
    pieces of text where it does not; gaps are those between pieces."""

    tokens: int = 0
    wall_ns: int = 0
    first_ns: list[int] = field(default_factory=list)
    gaps_ns: list[int] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.tokens * 1e9 / self.wall_ns

    def add(self, other: Taken) -> None:
        self.tokens += other.tokens
        self.wall_ns += other.wall_ns
        self.first_ns += other.first_ns
        self.gaps_ns += other.gaps_ns


def ask(port: int, question: str, tokens: int, sampling: Mapping[str, float]) -> Taken:
    """One streamed answer. Raises BackendError where the server gives none.

    What comes is kept and read when the answer is whole: a client that works between two tokens
    takes the server's time, as they share the cores.
    """
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        **sampling,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    start = time.perf_counter_ns()
    parts: list[tuple[int, bytes]] = []
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise BackendError(f"the server said {answer.status}: {answer.read()[:200]!r}")
        while part := answer.read1():
            parts.append((time.perf_counter_ns(), part))
        return taken_of(start, parts)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BackendError(f"the server broke off: {error!r}") from None
    finally:
        connection.close()


def taken_of(start: int, parts: Sequence[tuple[int, bytes]]) -> Taken:
    """What came, by the times of its parts. Raises BackendError where that is no text."""
    marks: list[int] = []
    made, rest = 0, b""
    for mark, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        texts = 0
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            choices = said.get("choices") or [{}]
            texts += bool(choices[0].get("delta", {}).get("content"))
            made = (said.get("usage") or {}).get("completion_tokens", made)
        marks += [mark] * texts
    if not marks:
        raise BackendError("the server gave no text")
    gaps = [after - before for before, after in pairwise(marks)]
    return Taken(made or len(marks), marks[-1] - start, [marks[0] - start], gaps)


def load(port: int, clients: int, first: int, tokens: int, sampling: Mapping[str, float]) -> Taken:
    """So many clients at once, with questions from the ``first`` on."""
    ready = Barrier(clients + 1)

    def client(number: int) -> Taken:
        ready.wait()
        return ask(port, question(first + number), tokens, sampling)

    taken = Taken()
    with ThreadPoolExecutor(clients) as threads:
        answers = [threads.submit(client, number) for number in range(clients)]
        ready.wait()
        start = time.perf_counter_ns()
        for answer in answers:
            taken.add(answer.result())
    taken.wall_ns = time.perf_counter_ns() - start
    return taken


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """A server as a process, from the time that it answers on."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise BackendError(f"{' '.join(command)} does not serve; run it to see why")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ours(bundle: Path, port: int, parallel: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "pocketslm", "serve", str(bundle), "--port", str(port)]
    return [*command, "--parallel", str(parallel), "--threads", str(threads)]


def theirs(gguf: Path, port: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf)]
    command += ["--port", str(port), "--n_ctx", "2048", "--n_threads", str(threads)]
    # Without it a second client breaks off the first one's answer.
    return [*command, "--interrupt_requests", "false"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama-cpp-python's server")
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8], help="(default: 1,2,4,8)")
    parser.add_argument("--parallel", type=int, help="of our server (default: the most clients)")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("-t", "--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--greedy", action="store_true", help="the likeliest token each time, which may be guessed"
    )
    args = parser.parse_args()
    sampling = GREEDY if args.greedy else SAMPLED
    if args.rounds * sum(args.clients) > MOST_QUESTIONS:
        parser.error(f"more than {MOST_QUESTIONS} questions: some would be asked twice")
    parallel = args.parallel or max(args.clients)
    ports = {"pocketslm": free_port()}
    commands = [ours(args.bundle, ports["pocketslm"], parallel, args.threads)]
    if args.gguf:
        ports["llama-cpp-python"] = free_port()
        commands.append(theirs(args.gguf, ports["llama-cpp-python"], args.threads))
    taken = {(name, clients): Taken() for name in ports for clients in args.clients}
    try:
        with ExitStack() as stack:
            for command, port in zip(commands, ports.values(), strict=True):
                stack.enter_context(running(command, port))
                ask(port, "Hello!", 8, sampling)  # first touches of memory, not counted
            for turn in range(args.rounds):
                first = turn * sum(args.clients)
                for clients in args.clients:
                    for name, port in ports.items():
                        taken[name, clients].add(load(port, clients, first, args.tokens, sampling))
                    first += clients
    except PocketSlmError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for (name, clients), one in taken.items():
        gain = one.per_second / taken[name, args.clients[0]].per_second
        times = [f"{percentile(one.gaps_ns, percent) / 1e6:.1f} ms" for percent in (50, 99)]
        first = f"{statistics.median(one.first_ns) / 1e6:.0f} ms"
        rows.append([name, str(clients), f"{one.per_second:.1f}", f"{gain:.2f}", first, *times])
    head = ["server", "clients", "t/s of all", "of the first", "TTFT", "a token, p50", "p99"]
    show(md_table(head, ["l", *"rrrrrr"], rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
