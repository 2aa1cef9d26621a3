"""Measure the gain of guesses, on the assistant's tasks over news articles and on free chats.

    python -m pocketslm.profiling.lookup out/smollm2

Two sessions of one model make every text in turns, one with and one without guesses, and the tokens
must be the same. A session guesses from the text and from the answers before it, so that each
repetition begins with new sessions. It prints tokens a second after each first token, of the
repetition with the middle ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass
class Figures:
    """The tokens of some texts after the first ones, and nanoseconds without and with guesses."""

    tokens: int = 0
    plain_ns: int = 0
    guessed_ns: int = 0

    def add(self, other: Figures) -> None:
        self.tokens += other.tokens
        self.plain_ns += other.plain_ns
        self.guessed_ns += other.guessed_ns

    @property
    def ratio(self) -> float:
        return self.plain_ns / max(1, self.guessed_ns)

    def __str__(self) -> str:
        plain, guessed = (self.tokens / max(1, ns) * 1e9 for ns in (self.plain_ns, self.guessed_ns))
        return (
            f"{self.tokens:6} tokens: plain {plain:6.1f} a second, "
            f"with guesses {guessed:6.1f}, ratio {self.ratio:.2f}"
        )


def compare(load: Callable[[], Model], work: Sequence[Task], turn: int) -> list[Figures]:
    """What the tasks take, one after the other; who goes first changes with the ``turn``."""
    found = []
    with load() as plain, load() as guessing:
        for number, task in enumerate(work):
            pair = Timed(plain, 0), Timed(guessing, None)
            for one in pair if (turn + number) % 2 else reversed(pair):
                task(one)
            assert pair[0].texts == pair[1].texts, "guesses changed the tokens"
            tokens = sum(max(0, len(text) - 1) for text in pair[0].texts)
            found.append(Figures(tokens, pair[0].nanoseconds, pair[1].nanoseconds))
    return found


def middle(names: Sequence[str], runs: Sequence[Sequence[Figures]]) -> dict[str, Figures]:
    """Of each group of tasks the run with the middle ratio."""
    groups: dict[str, list[Figures]] = {}
    for run in runs:
        sums: dict[str, Figures] = {"documents": Figures()}
        for name, figures in zip(names, run, strict=True):
            for group in (name,) if name == "chat" else ("documents", name):
                sums.setdefault(group, Figures()).add(figures)
        for group, figures in sums.items():
            groups.setdefault(group, []).append(figures)
    return {
        group: sorted(some, key=lambda one: one.ratio)[len(some) // 2]
        for group, some in groups.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--articles", type=int, default=20, help="(default: 20)")
    parser.add_argument("--first", type=int, default=FIRST, help=f"their first (default: {FIRST})")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    articles = fetch("lee", say).read_text(encoding="utf-8").splitlines()[arguments.first :]
    work: list[tuple[str, Task]] = []
    with Library(":memory:") as library:
        for article in articles[: arguments.articles]:
            title = " ".join(article.split()[:6])
            work += tasks(library.add(make_source(title, "txt", [Block(article)]))).items()
        work += [("chat", chat(prompt)) for prompt in CHATS]

        def load() -> Model:
            return Model.load(arguments.bundle, "native", arguments.threads)

        with load() as model:
            print(f"{model.name}, {model.backend}")
        runs = [
            compare(load, [task for _, task in work], turn) for turn in range(arguments.repetitions)
        ]
    for name, figures in middle([name for name, _ in work], runs).items():
        print(f"{name:10} {figures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
