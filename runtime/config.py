"""How to generate: Hugging Face's GenerationConfig, the part that a decoder-only model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from pocketslm.errors import UsageError

# The options that hold an answer to something.
ConstraintKind = Literal["json_schema", "regex", "grammar"]
CONSTRAINTS: tuple[ConstraintKind, ...] = ("json_schema", "regex", "grammar")
FLAGS = ("do_sample", "penalize_prompt", "ignore_eos", "logprobs")

# Logits divided by less may not be finite any more, and by more are all alike.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e9
# Whole numbers up to here are the same in JSON, which the runner reads.
MOST_SEED = 10**15
# No model has more tokens, so that a top_k from here on rules none out.
MOST_TOKENS = 1 << 24


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class GenerationConfig:
    """Options of generation. Names, meanings and defaults are those of transformers, but for
    ``do_sample``: unless it is set, decoding is greedy.

    - ``max_new_tokens``: the most new tokens; None goes on until a stop or the end of the context.
    - ``do_sample``: draw tokens. If False, the most probable token is taken, and temperature,
      top_k, top_p, min_p and typical_p are ignored. A temperature of 0 has the same effect.
    - ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``: how tokens are drawn.
    - ``repetition_penalty``: makes tokens that were seen less probable. ``penalize_prompt`` says
      whether the prompt's tokens count as seen, as they do in transformers.
    - ``seed``: makes drawing repeatable; None draws differently each time.
    - ``stop_strings``: texts that end generation. They are not part of the answer.
    - ``ignore_eos``: go on after an end-of-sequence token, as benchmarks do.
    - ``logprobs``: give the log-probability of each token, which takes the logits of the whole
      vocabulary.
    - ``prompt_lookup_num_tokens``: the most tokens that the native engine guesses, from where the
      last tokens stood before in the prompt, the answer or the session's other answers, and checks
      in one step. The answer is the same. None guesses as many as pay off, 0 none. Sampling and
      logprobs turn guessing off.
    - ``json_schema``, ``regex``, ``grammar``: hold the answer to one of these at most. They are a
      JSON schema, as text or as the value that it stands for; an expression that the whole answer
      matches; and a grammar in GBNF. The answer ends where nothing may follow. An answer that
      max_new_tokens or the context cuts short is not whole. See docs/how-to/schema.md.
    - ``adapter``: one of the bundle's LoRA adapters, for this answer alone. The native engine makes
      answers with several at once. None: the model's, see `Model.use_adapter`; "": none.

    Raises UsageError for a value that makes no sense.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    penalize_prompt: bool = True
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    prompt_lookup_num_tokens: int | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        given: object = self.stop_strings
        if isinstance(given, str | list):  # as transformers takes them
            stops = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, "stop_strings", stops)
        count, seed, guesses = self.max_new_tokens, self.seed, self.prompt_lookup_num_tokens
        held = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        rules = {
            "max_new_tokens": (count is None or (_whole(count) and count >= 1), "1 or more"),
            "temperature": (
                _number(self.temperature)
                and (
                    self.temperature == 0
                    or LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE
                ),
                f"0 (greedy) or a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}",
            ),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "0 (off) or more"),
            "top_p": (_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1"),
            "typical_p": (
                _number(self.typical_p) and 0 < self.typical_p <= 1,
                "above 0 and at most 1",
            ),
            "repetition_penalty": (
                _number(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100,
                "from 0.01 to 100",
            ),
            "prompt_lookup_num_tokens": (
                guesses is None or (_whole(guesses) and guesses >= 0),
                "0 (off) or more",
            ),
            "seed": (seed is None or (_whole(seed) and 0 <= seed <= MOST_SEED), "0 to 10^15"),
            "stop_strings": (
                isinstance(self.stop_strings, tuple)
                and all(isinstance(text, str) and text for text in self.stop_strings),
                "non-empty texts",
            ),
        }
        rules |= {name: (getattr(self, name) in (True, False), "True or False") for name in FLAGS}
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if len(held) > 1:
            raise UsageError(f"{' and '.join(held)} together; an answer is held to one of them")
        if held and self.ignore_eos:
            raise UsageError(f"ignore_eos with {held[0]}, which says where an answer ends")
        for name in ("regex", "grammar", "adapter"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} must be a text")
        if not isinstance(self.json_schema, str | None):
            try:
                text = json.dumps(self.json_schema, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise UsageError(f"json_schema is no JSON: {error}") from None
            object.__setattr__(self, "json_schema", text)

    @property
    def constraint(self) -> tuple[ConstraintKind, str] | None:
        """The kind and the text of the constraint, or None."""
        for kind in CONSTRAINTS:
            if isinstance(text := getattr(self, kind), str):
                return kind, text
        return None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature > 0

    def but(self, **changes: Any) -> GenerationConfig:
        """A copy with fields changed; None leaves a field as it is."""
        known = {field.name for field in fields(self)}
        if unknown := set(changes) - known:
            raise UsageError(f"unknown option {unknown}, expected some of {sorted(known)}")
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def generation_defaults(folder: Path) -> GenerationConfig:
    """The model's own sampling settings from ``generation_config.json``, if it has that file.

    Fields that transformers knows and we do not are ignored.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationConfig()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = (
            *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
            "repetition_penalty",
        )
        return GenerationConfig().but(**{name: data.get(name) for name in known})
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, UsageError) as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from None
