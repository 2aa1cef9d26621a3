"""onnxruntime-genai, by default on the int4 graph that its own model builder makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pocketslm.errors import BackendError
from pocketslm.profiling.engine import Engine, Job, library_version, missing_library
from pocketslm.profiling.peers import genai_builder
from pocketslm.runtime.arrays import np

_DISTRIBUTION = "onnxruntime-genai"


class OrtGenai:
    """onnxruntime-genai on a folder with genai_config.json; our bundles are such folders too."""

    name = "ort-genai"
    artefact = "a folder with genai_config.json"

    def version(self) -> str:
        return library_version(_DISTRIBUTION)

    def available(self) -> str | None:
        return missing_library("onnxruntime_genai", _DISTRIBUTION)

    def prepare(self, source: Path, cache: Path) -> Path:
        """Run the model builder as its README says, once for a checkpoint and builder version."""
        folder = cache / f"ort-genai-{self.version()}-int4"
        if folder.exists():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building.", dir=cache) as aside:
            checkpoint, built = Path(aside, "hf"), Path(aside, "built")
            _write_hf(source, checkpoint)
            _build(checkpoint, built, Path(aside, "downloads"))
            try:
                built.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
        return folder

    def import_library(self, job: Job) -> None:
        import onnxruntime_genai  # noqa: F401

    def open(self, job: Job) -> Engine:
        return _Engine(job)


def _write_hf(source: Path, folder: Path) -> None:
    """Write a Hugging Face folder, the only form that the builder reads. GGUF files are
    dequantized.
    """
    from pocketslm.models.checkpoint import open_checkpoint
    from pocketslm.models.hf_writer import save_hf

    save_hf(open_checkpoint(source), folder)


def _build(checkpoint: Path, out: Path, downloads: Path) -> None:
    command = [sys.executable, "-P", "-m", genai_builder.__name__]
    command += ["-m", str(checkpoint), "-o", str(out), "-p", "int4", "-e", "cpu"]
    done = subprocess.run(
        [*command, "-c", str(downloads)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode or not (out / "genai_config.json").exists():
        lines = done.stderr.strip().splitlines() or ["it wrote nothing to stderr"]
        raise BackendError(
            f"onnxruntime-genai's model builder failed: {lines[-1].strip()[:300]}; run it yourself "
            f"and give the folder as --peer {OrtGenai.name}=FOLDER"
        )


def _window(folder: Path) -> int:
    """The window of the model's layers, or 0 if none has one."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    found: int = config["model"]["decoder"].get("sliding_window", {}).get("window_size", 0)
    return found


class _Engine:
    def __init__(self, job: Job) -> None:
        import onnxruntime_genai as og

        self.backend = "onnxruntime cpu"
        options = {"intra_op_num_threads": job.threads}
        try:
            # One more than the cache holds, because the token chosen last counts though it is never
            # run. The operator refuses a cache that is shorter than a layer's window.
            length = max(job.context + 1, _window(Path(job.artefact)))
            config = og.Config(job.artefact)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = og.Model(config)
            params = og.GeneratorParams(self._model)
            # min_length keeps an end-of-sequence token from ending the measurement.
            params.set_search_options(do_sample=False, max_length=length, min_length=length)
            self._generator = og.Generator(self._model, params)
        except Exception as error:  # its exceptions have no common public type
            reason = " ".join(str(error).split())[:300]
            raise BackendError(f"onnxruntime-genai cannot load {job.artefact}: {reason}") from None

    def reset(self) -> None:
        self._generator.rewind_to(0)

    def prefill(self, ids: list[int]) -> int:
        self._generator.append_tokens(np.array(ids, np.int32))
        return self.step()

    def step(self) -> int:
        """Runs the last token unless its logits are there already, as they are after a prefill."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])
