"""Measure the gain of prompt lookup, on the assistant's tasks over news articles and on free chats.

    python -m pocketslm.profiling.lookup out/smollm2

Every text is generated with and without guesses, in turns, on one model, and the tokens must be the
same. It prints tokens a second after each first token, by the shortest time of each text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pocketslm.models.catalog import fetch
from pocketslm.runtime.assistant.assistant import Assistant
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record
from pocketslm.terminal import say

FIRST = 100  # number of news articles that are read
CHATS = (
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Give me five ideas for a birthday party.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite letter to a landlord about a broken heater.",
    "How do I cook rice?",
    "Describe a walk through an old town in the rain.",
    "What should I know before I adopt a dog?",
    "Write a poem about the sea.",
    "Why do leaves change their colour in autumn?",
)
TOKENS = 160  # new tokens of a chat


class Timed:
    """A model that records the tokens of all texts, and the nanoseconds after each first token.

    ``guesses`` is GenerationConfig's ``prompt_lookup_num_tokens``.
    """

    def __init__(self, model: Model, guesses: int | None) -> None:
        self._model, self._guesses = model, guesses
        self.name, self.backend, self.context = model.name, model.backend, model.context
        self.tokenizer = model.tokenizer
        self.texts: list[list[int]] = []
        self.nanoseconds = 0

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        config = (config or self._model.defaults).but(prompt_lookup_num_tokens=self._guesses)
        text: list[int] = []
        self.texts.append(text)
        first = last = 0
        try:
            for record in self._model.generate(prompt, config):
                last = record.time_ns
                first = first or last
                text.append(record.token)
                yield record
        finally:
            self.nanoseconds += last - first


Task = Callable[[Timed], object]


def tasks(document: Document) -> dict[str, Task]:
    """The tasks that the assistant does with a document."""
    question = f"What is said of {document.title}?"
    return {
        "summarise": lambda model: list(Assistant(model).summarize(document)),
        "ask": lambda model: list(Assistant(model).ask(document, question)),
        "suggest": lambda model: list(Assistant(model).suggest(document)),
    }


def chat(prompt: str) -> Task:
    def run(model: Timed) -> object:
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        return list(model.generate(ids, GenerationConfig(max_new_tokens=TOKENS)))

    return run


def compare(model: Model, task: Task, repetitions: int) -> tuple[int, int, int]:
    """Count the tokens after the first ones, and take the least nanoseconds without and with
    guesses.
    """
    times: dict[int | None, list[int]] = {0: [], None: []}
    for repetition in range(repetitions):
        made = []
        for guesses in (0, None) if repetition % 2 else (None, 0):
            timed = Timed(model, guesses)
            task(timed)
            times[guesses].append(timed.nanoseconds)
            made.append(timed.texts)
        assert made[0] == made[1], "guesses changed the tokens"
    return sum(max(0, len(text) - 1) for text in made[0]), min(times[0]), min(times[None])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--articles", type=int, default=20, help="(default: 20)")
    parser.add_argument("--first", type=int, default=FIRST, help=f"their first (default: {FIRST})")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    model = Model.load(arguments.bundle, "native", arguments.threads)
    articles = fetch("lee", say).read_text(encoding="utf-8").splitlines()[arguments.first :]
    work: dict[str, list[Task]] = {}
    print(f"{model.name}, {model.backend}")
    with Library(":memory:") as library:
        for article in articles[: arguments.articles]:
            title = " ".join(article.split()[:6])
            document = library.add(make_source(title, "txt", [Block(article)]))
            for name, task in tasks(document).items():
                work.setdefault(name, []).append(task)
        figures = {"documents": (0, 0, 0)}
        for name, some in {**work, "chat": [chat(prompt) for prompt in CHATS]}.items():
            rows = [compare(model, task, arguments.repetitions) for task in some]
            tokens, plain, guessed = map(sum, zip(*rows, strict=True))
            figures[name] = tokens, plain, guessed
            if name in work:
                a, b, c = figures["documents"]
                figures["documents"] = a + tokens, b + plain, c + guessed
    for name, (tokens, plain, guessed) in figures.items():
        rates = [tokens / max(1, time) * 1e9 for time in (plain, guessed)]
        print(
            f"{name:10} {tokens:6} tokens: plain {rates[0]:6.1f} a second, "
            f"with guesses {rates[1]:6.1f}, ratio {rates[1] / max(1e-9, rates[0]):.2f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
