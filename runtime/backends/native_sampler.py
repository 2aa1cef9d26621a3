"""Drawing tokens by the native operators: what ``runtime/sampling.py`` draws, in less time."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence

import numpy as np

from pocketslm.runtime.backends import Logits
from pocketslm.runtime.backends.native_library import ErrorText, Generation, load_library
from pocketslm.runtime.config import GenerationConfig


def sampling_options(config: GenerationConfig) -> Generation:
    """The options that say how tokens are drawn; a seed is drawn where there is none."""
    options = Generation(top_p=1.0, repetition_penalty=config.repetition_penalty)
    options.spare_prompt = not config.penalize_prompt
    if config.samples:
        options.temperature, options.top_k = config.temperature, config.top_k
        options.top_p, options.min_p = config.top_p, config.min_p
        options.seed = secrets.randbits(64) if config.seed is None else config.seed
    return options


class NativeSampler:
    """Picks a token from logits [V], which it may change; ``ids`` are the text before it.

    prompt: how many of them are the prompt.
    """

    def __init__(self, config: GenerationConfig, prompt: int) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._error = ErrorText()
        self._penalizes = config.repetition_penalty != 1.0
        self._start = 0 if config.penalize_prompt else prompt
        self._token = ctypes.c_int32()
        options = sampling_options(config)
        status = self._library.pslm_sampler_open(
            ctypes.byref(options), ctypes.byref(self._handle), self._error.argument
        )
        self._error.check(status)

    def __call__(self, ids: Sequence[int], logits: Logits) -> int:
        logits = np.ascontiguousarray(logits, np.float32)
        seen = np.asarray(ids[self._start :] if self._penalizes else (), np.int32)
        status = self._library.pslm_sampler_pick(
            self._handle,
            logits.ctypes.data,
            logits.size,
            seen.ctypes.data,
            seen.size,
            ctypes.byref(self._token),
            self._error.argument,
        )
        self._error.check(status)
        return self._token.value

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_sampler_close(self._handle)
