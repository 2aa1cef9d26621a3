"""model.slm: files that were cut, altered or made up are errors, never crashes."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import earlier_model_file
import numpy as np
import pytest
from native_support import quantize, tiny_config, tiny_weights

from pocketslm.errors import BackendError, BundleError
from pocketslm.models.config import LayerSize
from pocketslm.runtime.backends.native import NativeModel

SEED = 99
MUTATIONS = 100_000  # with up to three changes each, spread over header and section table


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "m.slm"
    config = tiny_config(
        vocab_size=16,
        intermediate_size=64,
        hidden_size=32,
        num_attention_heads=4,
        layer_sizes=(LayerSize(2, 2, 32), LayerSize(4, 2, 64)),
    )
    weights = tiny_weights(config, lambda name, values: quantize(values, 4, "zp"))
    earlier_model_file.write(path, config, weights)
    return path.read_bytes()


def open_bytes(path: Path, data: bytes) -> NativeModel:
    path.write_bytes(data)
    return NativeModel(path)


def test_missing_and_irregular_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot open"):
        NativeModel(tmp_path / "none.slm")
    with pytest.raises(BundleError, match="not a regular file"):
        NativeModel(tmp_path)
    with pytest.raises(BundleError, match="shorter than its header"):
        open_bytes(tmp_path / "m.slm", b"PSLMODEL")


def test_every_truncation_is_an_error(tmp_path: Path, content: bytes) -> None:
    lengths = {*range(0, 2048, 13), len(content) - 1, len(content) // 2}
    for length in sorted(lengths):
        with pytest.raises(BundleError, match=r"invalid model\.slm"):
            open_bytes(tmp_path / "m.slm", content[:length])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"XSLMODEL", "magic"),
        (8, struct.pack("<I", 4), "version 4, this build reads up to 3"),
        (8, struct.pack("<I", 3), "the program is missing"),
        (8, struct.pack("<I", 1), "not those of the header"),
        (32, struct.pack("<I", 2), "not those of the header"),
        (44, struct.pack("<I", 32), "not those of the header"),
        (16, struct.pack("<Q", 5), "the file has"),
        (24, struct.pack("<I", 0), "dimension"),
        (24, struct.pack("<I", 2**31), "dimension"),
        (28, struct.pack("<I", 2**31), "dimension"),
        (32, struct.pack("<I", 3), "multiple"),
        (40, struct.pack("<I", 20), "multiple"),
        (56, struct.pack("<I", 17), "rope_dim"),
        (60, struct.pack("<f", float("nan")), "rms_eps"),
        (12, struct.pack("<I", 2**32 - 1), "section table"),
        (12, struct.pack("<I", 3), "missing"),
        (128 + 16, struct.pack("<Q", 2**63), "outside the file"),
        (128 + 16, struct.pack("<Q", 64), "outside the file"),
        (128 + 24, struct.pack("<Q", 2**64 - 64), "outside the file"),
        (128, struct.pack("<H", 77), "unknown"),
        (132, struct.pack("<I", 9), "unknown"),
    ],
)
def test_named_faults(
    tmp_path: Path, content: bytes, offset: int, value: bytes, message: str
) -> None:
    changed = content[:offset] + value + content[offset + len(value) :]
    with pytest.raises(BundleError, match=message) as caught:
        open_bytes(tmp_path / "m.slm", changed)
    assert "\n" not in str(caught.value)


def test_random_mutations_never_crash(tmp_path: Path, content: bytes) -> None:
    """What is still accepted must run; everything else is a BundleError."""
    rng = np.random.default_rng(SEED)
    sections = struct.unpack_from("<I", content, 12)[0]
    table_end = 128 + 32 * sections
    path = tmp_path / "m.slm"
    path.write_bytes(content)
    accepted = 0
    interesting = [0, 1, 2, 15, 16, 17, 31, 63, 64, 127, 128, 255]
    with path.open("r+b", buffering=0) as file:
        for _ in range(MUTATIONS):
            places = rng.integers(8, table_end, rng.integers(1, 4))
            for place in places:
                file.seek(int(place))
                file.write(bytes([int(rng.choice(interesting))]))
            try:
                model = NativeModel(path)
            except BundleError:
                pass
            else:
                accepted += 1
                if accepted <= 200 and model.info.max_context <= 4096:
                    # Weights that are other bytes may give logits that are not finite.
                    with contextlib.suppress(BackendError):
                        model.session(threads=1).forward([0, 1, 2])
                del model
            file.seek(0)
            file.write(content[:table_end])
    assert accepted < MUTATIONS // 2
