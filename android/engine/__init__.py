"""Models, off the UI thread: which engine runs them, what they need, and work in the background."""

from __future__ import annotations

from pathlib import Path

from pocketslm.errors import BackendError
from pocketslm.runtime.cores import choice_here, keep_to
from pocketslm.runtime.model import Model

# Engine -> (strings key of its name, of where it was tried). See docs/explanation/app.md.
ENGINES = {
    "auto": ("engine_auto", ""),
    "runner": ("engine_runner", "tested_runner"),
    "native": ("engine_native", "tested_desktop"),
    "onnx": ("engine_onnx", "tested_desktop"),
    "onnx_aar": ("engine_onnx_aar", "tested_stand_in"),
}
ON_PHONE = ("auto", "runner", "onnx_aar")
ON_DESKTOP = ("auto", "runner", "native", "onnx")


def open_model(path: Path, engine: str, threads: int, *, phone: bool) -> Model:
    """Load a bundle with the engine of the settings; "auto" is the runner on a phone.

    With 0 threads it takes what `pocketslm tune-threads` found for this machine, if anything, and
    this thread keeps to the cores that it found. Raises PocketSlmError.
    """
    if engine == "auto":
        engine = "runner" if phone else "auto"
    # A bundle's files are compared with their SHA-256 when it is imported, once.
    if engine == "onnx_aar":
        from pocketslm.android.engine.onnx_aar import load

        return load(path, threads)
    if engine not in ("auto", "native", "onnx", "runner"):
        raise BackendError(f"engine {engine!r} is unknown, expected one of {', '.join(ENGINES)}")
    tuned = choice_here(path) if not threads else None
    keep_to(tuned.cpus if tuned else ())
    threads = tuned.threads if tuned else threads
    return Model.load(path, engine, threads or None, verify=False)
