"""Keep a server busy with good and bad clients, and see that it loses no slot and no memory.

    python -m tests.soak out/smollm2 --minutes 5

For so long, clients ask for answers, whole and streamed, hang up in the middle, send rubbish, and
bodies of 100 MB. A question with one right answer must always get it. At the end nobody may wait,
as many answers as there are slots must come at once, no more files may be open than at the start,
and memory must not have grown.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from typing import Any

from pocketslm.profiling.lookup import CHATS
from pocketslm.profiling.serving import free_port, ours, running

PARALLEL = 4
CLIENTS = 7
LARGE = 100 << 20
# Of memory, between the middle and the last third of the time; and of any measurement.
GROWTH, NOISE = 0.05, 8 << 20


def request(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def chat(question: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": 24, **options}


class Clients:
    """What clients do, and what came of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.texts: dict[str, str] = {}
        self.lock = threading.Lock()

    def good(self, rng: Random) -> None:
        question = rng.choice(CHATS)
        status, body = request(self.port, "/v1/chat/completions", chat(question, temperature=0))
        if status == 503:
            self.counts["busy"] += 1
            return
        text = body["choices"][0]["message"]["content"] if status == 200 else str(body)
        with self.lock:
            expected = self.texts.setdefault(question, text)
        if status != 200 or text != expected:
            self.wrong.append(f"{status}: {text!r}, not {expected!r}")

    def drawn(self, rng: Random) -> None:
        options = rng.choice(
            (
                {"temperature": 0.8, "seed": rng.randrange(99)},
                {"logprobs": True},
                {"stop": ["e"]},
                {"response_format": {"type": "json_object"}},
                {"max_tokens": 1},
            )
        )
        self._expect(chat(rng.choice(CHATS), **options), 200, 503)

    def rubbish(self, rng: Random) -> None:
        bad: tuple[Any, ...] = ([], {"messages": 1}, {"messages": []}, {"n": 2}, chat("a", seed=-1))
        self._expect(rng.choice(bad), 400)
        self._raw(rng.randbytes(rng.randrange(2000)))

    def hang_up(self, rng: Random) -> None:
        body = json.dumps(chat(rng.choice(CHATS), stream=rng.random() < 0.5)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        whole = head.encode() + b"\r\n\r\n" + body
        cut = len(whole) if rng.random() < 0.8 else rng.randrange(len(whole))
        self._raw(whole[:cut], rng.choice((0.0, 0.05, 0.3)))

    def large(self, _: Random) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 30) as one:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LARGE}"
            one.sendall(head.encode() + b"\r\n\r\n")
            part = b" " * (1 << 20)
            for _ in range(LARGE // len(part)):
                one.sendall(part)
            if b" 413 " not in one.recv(100):
                self.wrong.append("a body of 100 MB was taken")

    def _expect(self, body: Any, *statuses: int) -> None:
        status, answer = request(self.port, "/v1/chat/completions", body)
        if status not in statuses:
            self.wrong.append(f"{status}, not {statuses}: {answer} to {body}")

    def _raw(self, data: bytes, wait: float = 0.0) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 30) as one:
            one.sendall(data)
            time.sleep(wait)

    def work(self, seed: int, until: float) -> None:
        rng = Random(seed)
        kinds: list[Callable[[Random], None]] = [self.good, self.drawn, self.hang_up]
        kinds += [self.good, self.hang_up, self.rubbish, self.large]
        while time.monotonic() < until:
            kind = rng.choice(kinds)
            self.counts[kind.__name__] += 1
            try:
                kind(rng)
            except (OSError, HTTPException, ValueError, LookupError) as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")


def child() -> int:
    """The one process that this one started: the server."""
    me = os.getpid()
    return int(Path(f"/proc/{me}/task/{me}/children").read_text().split()[0])


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def threads_of(process: int) -> int:
    return len(list(Path(f"/proc/{process}/task").iterdir()))


def soak(bundle: Path, minutes: float) -> list[str]:
    """What was wrong; nothing where all is well."""
    port, seconds = free_port(), minutes * 60
    # States of earlier prompts fill the memory that they may have before the middle of a run.
    with running([*ours(bundle, port, PARALLEL, 2), "--prefix-mb", "16"], port):
        clients, process = Clients(port), child()
        clients.good(Random(0))  # which loads what is loaded late
        memory, threads_now = [resident(process)], [threads_of(process)]
        files = open_files(process)
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as threads:
            done = [threads.submit(clients.work, seed, until) for seed in range(CLIENTS)]
            while time.monotonic() < until:
                time.sleep(min(2.0, seconds / 30))
                memory.append(resident(process))
                threads_now.append(threads_of(process))
        for one in done:
            one.result()
        wrong = clients.wrong
        deadline = time.monotonic() + 60
        while (waiting := request(port, "/health")[1]["waiting"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if waiting:
            wrong.append(f"{waiting} requests wait that nobody sent")
        with ThreadPoolExecutor(PARALLEL) as threads:
            for _ in threads.map(clients.good, map(Random, range(PARALLEL))):
                pass
        while (left := open_files(process)) > files and time.monotonic() < deadline:
            time.sleep(0.1)
        if left > files:
            wrong.append(f"{left} files are open, {files} were at the start")
        threads_now.append(threads_of(process))
    third = len(memory) // 3
    before, after = (statistics.median(part) for part in (memory[third:-third], memory[-third:]))
    if after - before > GROWTH * before + NOISE:
        wrong.append(f"memory grew from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
    print(f"{minutes} minutes, {dict(clients.counts)}")
    print(
        f"memory: {memory[0] / 1e6:.0f} MB at the start, {before / 1e6:.0f} MB in the middle, "
        f"{after / 1e6:.0f} MB in the last third, at most {max(memory) / 1e6:.0f}"
    )
    print(
        f"open files: {files}, then {left}; threads: {threads_now[0]}, then {threads_now[-1]}, at "
        f"most {max(threads_now)}; {PARALLEL} slots of {PARALLEL} answered at the end"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    wrong = soak(args.bundle, args.minutes)
    for one in wrong[:20]:
        print(one, file=sys.stderr)
    print(f"{len(wrong)} things were wrong" if wrong else "nothing was wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
