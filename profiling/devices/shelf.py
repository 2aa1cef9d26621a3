"""Several devices at once: each is measured for itself, and one that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event, Lock

from pocketslm.errors import UsageError
from pocketslm.profiling.devices import open_device
from pocketslm.profiling.devices.device import Device, Progress

Measure = Callable[[Device, Progress], None]


def measure_each(
    specs: Sequence[str], measure: Measure, progress: Progress, say: Callable[[str], None]
) -> None:
    """Call ``measure`` with every device. With several, each has a thread of its own.

    - ``progress``: is told by one device at a time. With several, steps begin with its name.
    - ``say``: called with each error but the first, which is raised once all are done.

    After Ctrl-C every device ends with the step that it is in.
    """
    if twice := sorted({spec for spec in specs if specs.count(spec) > 1}):
        raise UsageError(f"device {twice[0]} is named twice; name each device once")
    if len(specs) == 1:
        with open_device(specs[0]) as device:
            measure(device, progress)
        return
    interrupted, telling = Event(), Lock()

    def measure_one(spec: str) -> None:
        def told(step: str, fraction: float) -> None:
            if interrupted.is_set():
                raise KeyboardInterrupt
            with telling:
                progress(f"{spec}: {step}", fraction)

        with open_device(spec) as device:
            measure(device, told)

    with ThreadPoolExecutor(len(specs)) as pool:
        running = [pool.submit(measure_one, spec) for spec in specs]
        try:
            wait(running)
        except KeyboardInterrupt:
            interrupted.set()
            raise
    errors = [error for one in running if (error := one.exception()) is not None]
    for error in errors[1:]:
        say(f"pocketslm: error: {error}")
    if errors:
        raise errors[0]
