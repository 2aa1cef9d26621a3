"""The cost of holding an answer to a schema, as a part of a decode step.

``python -m pocketslm.profiling.constraint_cost BUNDLE [THREADS]`` writes a given answer token by
token. It times the step, which computes all logits as constrained decoding needs them, apart from
the mask and the advance. The first answer computes everything that it needs; the next one by the
same constraint reuses it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.constraint import Constraint, Grammar, TokenTexts
from pocketslm.runtime.model import Model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 80},
        "about": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 6},
        "kind": {"enum": ["person", "animal", "robot"]},
        "born": {"type": "string", "format": "date"},
        "score": {"type": "number"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
    },
    "additionalProperties": False,
}
REPEATS = 6
ANSWER = {
    "name": "Ana María de los Santos",
    "about": 'She writes software and "plays" the piano.\nShe lives near the sea, with two dogs.',
    "age": 42,
    "email": "ana.santos@example.org",
    "tags": ["writer", "engineer", "pianist"],
    "kind": "person",
    "born": "1984-02-29",
    "score": 98.25,
    "code": "ABC-1234",
}


def main() -> None:
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else None
    model = Model.load(sys.argv[1], "native", threads, verify=False)
    session, size = model.engine.session, model.engine.session.vocab_size
    tokens = model.tokenize(json.dumps(ANSWER, ensure_ascii=False))
    start = time.perf_counter()
    texts = TokenTexts.of(model.tokenizer, size)
    read = time.perf_counter()
    grammar = Grammar("json_schema", str(GenerationConfig(json_schema=SCHEMA).json_schema))
    compiled = time.perf_counter()
    print(
        f"{model.name}: {size} tokens; vocabulary {(read - start) * 1e3:.0f} ms, "
        f"schema {(compiled - read) * 1e3:.2f} ms; an answer of {len(tokens)} tokens"
    )
    for kind in ("first", "next"):
        step_ns: list[list[int]] = []
        mask_ns: list[list[int]] = []
        constraint = Constraint(grammar, texts)
        for _ in range(REPEATS):
            if kind == "first":
                constraint = Constraint(grammar, texts)
            constraint.restart()
            session.truncate(0)
            logits = session.forward(np.asarray(tokens[:1], np.int64))[0]
            step_ns.append([])
            mask_ns.append([])
            for token in tokens:
                begin = time.perf_counter_ns()
                constraint.apply(logits)
                assert np.isfinite(logits[token])
                constraint.advance(token)
                middle = time.perf_counter_ns()
                logits = session.forward(np.asarray([token], np.int64))[0]
                mask_ns[-1].append(middle - begin)
                step_ns[-1].append(time.perf_counter_ns() - middle)
        # The least of all repeats at each place, so that other work on the machine does not count.
        mask, step = (np.min(np.asarray(ns), axis=0).mean() / 1e3 for ns in (mask_ns, step_ns))
        print(
            f"{kind} answer: mask {mask:.0f} us a token in the mean, a step {step:.0f} us: "
            f"{100 * mask / step:.1f} % of it"
        )


if __name__ == "__main__":
    main()
