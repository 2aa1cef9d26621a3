"""Work off the UI thread: one job after the other, events back through a queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pocketslm.errors import PocketSlmError

log = logging.getLogger("pocketslm.android")


@dataclass
class Job:
    """Something to do. ``work(cancel)`` runs on the worker's thread and yields events; the
    callbacks run where `Worker.poll` is called."""

    work: Callable[[threading.Event], Iterator[Any]]
    on_event: Callable[[Any], None]
    on_error: Callable[[str], None]
    on_end: Callable[[], None]
    cancel: threading.Event = field(default_factory=threading.Event)


class Worker:
    """A thread with a queue. The UI polls, so that many small events cost one redraw."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self.current: Job | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        self._jobs.put(job)
        return job

    def poll(self) -> None:
        """Call what has become due, on this thread."""
        while True:
            try:
                call = self._events.get_nowait()
            except queue.Empty:
                return
            call()

    def close(self, timeout: float = 5.0) -> None:
        """Cancel the running job and end the thread."""
        if self.current is not None:
            self.current.cancel.set()
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.current = job
            try:
                for event in job.work(job.cancel):
                    self._events.put(partial(job.on_event, event))
            except PocketSlmError as error:
                self._events.put(partial(job.on_error, str(error)))
            except Exception as error:
                log.exception("a job failed")
                text = f"{type(error).__name__}: {error}"
                self._events.put(partial(job.on_error, text))
            self.current = None
            self._events.put(job.on_end)
