"""Search under a budget: which recipe fits a device best, by measurement.

Optuna proposes recipes, each is exported, held against the source and measured; what breaks the
budget is given up as early as it shows. All trials lie in a database (:mod:`study`), so that a
search can be stopped, taken up again, or shared by several workers.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketslm import schema
from pocketslm.errors import ExportError, UsageError
from pocketslm.export import study
from pocketslm.export.calibration_text import MIX, calibration_windows
from pocketslm.export.evaluate import Ids, evaluate, windows_of
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.depth import block_influence, least_influence
from pocketslm.export.prune.vocabulary import format_ranges, parse_ranges, tokens_of
from pocketslm.export.recipe import Recipe
from pocketslm.export.text import read_text
from pocketslm.folders import aside, written
from pocketslm.models.checkpoint import HEAD, Checkpoint, checkpoint_sha256
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import layer_matrices
from pocketslm.models.tensors import QuantTensor
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer, load_tokenizer_files

# What a budget can limit: its unit, and whether more is better.
METRICS: dict[str, tuple[str, bool]] = {
    "size": ("MB", False),
    "ram": ("MB", False),
    "kl": ("", False),
    "perplexity": ("", False),
    "ttft": ("s", False),
    "prefill": ("tps", True),
    "decode": ("tps", True),
}
OBJECTIVES = ("kl", "ram", "decode")
REPORT, PICTURE = "plan.md", "pareto.svg"
# What `prune` may try: shares of the layers to remove, and of each MLP's neurons to keep.
REMOVED_LAYERS, KEPT_NEURONS = (0, 0.1, 0.2), (0.875, 0.75)
_FEW_BITS = ["int6", "int5", "int3"]
INFLUENCE_TOKENS = 2048  # of the calibration text
QUICK_WINDOWS = 2  # enough to see that a recipe is hopeless
HOPELESS = 2.0  # times the KL allowed, after those

Metrics = dict[str, float]
Measure = Callable[[Path, "Budget"], Metrics]


@dataclass(frozen=True)
class Budget:
    """Limits by metric; ``prompt`` is how many tokens TTFT and prefill are measured with."""

    limits: Mapping[str, float]
    prompt: int = 512

    def broken(self, metrics: Mapping[str, float]) -> list[str]:
        """The limits that a trial breaks, in words; what was not measured breaks none."""
        return [
            f"{name} {_shown(name, metrics[name])} (limit {_shown(name, limit)})"
            for name, limit in self.limits.items()
            if name in metrics and not self._kept(name, metrics[name], limit)
        ]

    @staticmethod
    def _kept(name: str, value: float, limit: float) -> bool:
        return value >= limit if METRICS[name][1] else value <= limit


def parse_budget(text: str) -> Budget:
    """``ram=120MB,decode=250tps,ttft=1s@512,kl=0.05``; UsageError says what is wrong."""
    limits: dict[str, float] = {}
    prompt = 512
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)=(\d+(?:\.\d+)?)([a-zA-Z]*)(?:@(\d+))?\s*", part)
        if match is None or match[1] not in METRICS:
            raise UsageError(
                f"budget: {part.strip()!r} is not a limit such as ram=120MB; expected some of "
                f"{', '.join(METRICS)}"
            )
        name, number, unit, tokens = match.groups()
        if unit not in ("", METRICS[name][0]):
            raise UsageError(f"budget: {name} is in {METRICS[name][0] or 'no unit'}, not {unit!r}")
        if tokens is not None:
            if name not in ("ttft", "prefill") or not int(tokens):
                raise UsageError(f"budget: {part.strip()!r}: @TOKENS belongs to ttft and prefill")
            prompt = int(tokens)
        limits[name] = float(number)
    return Budget(limits, prompt)


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried; ``broken`` says why it is out, empty where it fits."""

    number: int
    recipe: Recipe
    metrics: Metrics
    broken: tuple[str, ...]


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in KL, memory and decode speed at once, by rising KL."""

    def costs(trial: Trial) -> tuple[float, ...]:
        signs = (-1.0 if METRICS[name][1] else 1.0 for name in OBJECTIVES)
        return tuple(
            sign * trial.metrics[name] for sign, name in zip(signs, OBJECTIVES, strict=True)
        )

    whole = [trial for trial in trials if set(OBJECTIVES) <= trial.metrics.keys()]
    front = []
    for one in whole:
        mine = costs(one)
        others = (costs(other) for other in whole if other is not one)
        if not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in others
        ):
            front.append(one)
    return sorted(front, key=costs)


def best(trials: Sequence[Trial]) -> Trial | None:
    """Of the trials within the budget the one nearest to the source; None where there is none."""
    fitting = [trial for trial in trials if not trial.broken and "kl" in trial.metrics]
    return min(fitting, key=lambda trial: trial.metrics["kl"], default=None)


@study.database_errors()
def search(
    checkpoint: Checkpoint,
    text: Path,
    budget: Budget,
    work: Path,
    *,
    calibration: str = MIX,
    base: Recipe | None = None,
    vocabulary: Path | None = None,
    prune: bool = False,
    trials: int = 16,
    windows: int = 8,
    storage: str | None = None,
    seed: int = 0,
    measure: Measure | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[Trial]:
    """Try recipes until ``trials`` of them are in the study, earlier ones counted; all of them.

    ``text``: what quality is measured on, by its first ``windows`` windows of 512 tokens; methods
    that calibrate see the end of ``calibration``, a file, a catalog name or ``mix``. ``work``: a
    folder for the database and the bundle being tried. ``storage``: the URL of another database, on
    which several workers may search at once. Each measures on a device of its own, and devices must
    be alike for their figures to be comparable.
    ``base``: the recipe whose other fields every trial shares. ``vocabulary``: also try to keep
    only this text's tokens. ``prune``: also try to leave out the layers of least influence and the
    MLP neurons of least activation on the calibration text. ``measure``: speed and memory of a
    bundle, by default on this machine. Raises UsageError, CheckpointError, ExportError.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials, expected at least 1")
    checkpoint.config.need_head("plan")
    checkpoint.config.need_own_layers("plan")
    work.mkdir(parents=True, exist_ok=True)
    kept = None if vocabulary is None else format_ranges(tokens_of(checkpoint, vocabulary))
    base = base or Recipe(targets=("native",))
    influence = _influence(checkpoint, base, calibration) if prune else None
    space = _Space(checkpoint, base, calibration, kept, influence)
    facts = [checkpoint_sha256(checkpoint), hashlib.sha256(text.read_bytes()).hexdigest()]
    facts += [str(windows), str(budget.prompt), str(kept), base.to_toml(), *["pruned"] * prune]
    facts += ["elsewhere"] * (measure is not None)  # those figures are not of this machine
    queue = study.open_study(
        storage or f"sqlite:///{work / 'trials.db'}",
        hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16],
        ["maximize" if METRICS[name][1] else "minimize" for name in OBJECTIVES],
        [(parameters, _written(space.recipe(_Fixed(parameters)))) for parameters in space.first],
        None if storage else seed,
    )
    bench = _Bench(checkpoint, text, windows, budget, work, measure or measure_here)

    def attempt(trial: Any) -> list[float]:
        recipe = space.recipe(trial)
        study.claim(queue, trial, _written(recipe), trials)
        done = _finished(queue, budget)
        known = next((one.metrics for one in done if one.recipe == recipe), None)
        # A worker may have died with all of it measured.
        metrics = known or trial.user_attrs.get(study.METRICS) or bench.run(recipe)
        trial.set_user_attr(study.METRICS, metrics)
        say(f"{len(done) + 1}/{trials} {describe(recipe)}: {_told(metrics, budget)}")
        if not set(OBJECTIVES) <= metrics.keys():
            study.give_up()
        return [metrics[name] for name in OBJECTIVES]

    study.work(queue, trials, attempt)
    return _finished(queue, budget)


def _written(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict())


def _told(metrics: Metrics, budget: Budget) -> str:
    shown = ", ".join(f"{name} {_shown(name, value)}" for name, value in metrics.items())
    broken = budget.broken(metrics)
    return shown + (f"; out: {'; '.join(broken)}" if broken else "")


class _Fixed(dict[str, Any]):
    """Parameters in the place of a trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.get(name, choices[0])


def window_of(checkpoint: Checkpoint) -> int:
    """Tokens of a window that quality is measured on."""
    return min(512, checkpoint.config.max_position_embeddings)


def _influence(checkpoint: Checkpoint, base: Recipe, calibration: str) -> list[float]:
    """Block influence of each layer on the calibration text: one forward pass."""
    files = checkpoint.tokenizer_files()
    window = base.calibration_window
    tokens = max(window, min(base.calibration_tokens, INFLUENCE_TOKENS))
    ids = calibration_windows(calibration, load_tokenizer_files(files), tokens, window)
    return block_influence(load_reference(checkpoint, window), ids)


class _Space:
    """The recipes that a search may try, as Optuna's parameters.

    ``influence``: of each layer; None: layers and neurons all stay.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: Recipe,
        calibration: str,
        vocabulary: str | None,
        influence: Sequence[float] | None,
    ) -> None:
        self.base, self.calibration, self.vocabulary = base, calibration, vocabulary
        self.influence = influence
        config = checkpoint.config
        self.depths = sorted({round(share * config.num_hidden_layers) for share in REMOVED_LAYERS})
        widths = {int(share * config.intermediate_size) // 32 * 32 for share in KEPT_NEURONS}
        self.widths = [config.intermediate_size, *sorted(widths - {0}, reverse=True)]
        quantized = isinstance(checkpoint.weight(layer_matrices(config)[0][0]), QuantTensor)
        head = isinstance(checkpoint.weight(HEAD), QuantTensor)
        self.weights = ["keep"] * quantized + ["int4", *_FEW_BITS, "int8"]
        self.head = ["keep"] * head + ["int8", "int4", *_FEW_BITS]
        # What a person would try first.
        int4 = {"weights": "int4", "grid": "min8", "method": "search+gptq"}
        as_is: dict[str, Any] = {"weights": self.weights[0], "head": self.head[0]}
        as_is |= int4 if self.weights[0] == "int4" else {}
        trim = vocabulary is not None
        self.first: list[dict[str, Any]] = [
            as_is | {"vocabulary": False},
            *[as_is | {"vocabulary": True}] * trim,
            int4 | {"head": "int4", "vocabulary": trim},
        ]
        if influence is not None:
            pruned = ({"layers": self.depths[-1]}, {"neurons": self.widths[-1]})
            whole = {"layers": 0, "neurons": self.widths[0]}
            self.first += [as_is | {"vocabulary": trim} | parts for parts in pruned]
            self.first = [whole | parameters for parameters in self.first]

    def recipe(self, trial: Any) -> Recipe:
        weights = trial.suggest_categorical("weights", self.weights)
        fields: dict[str, Any] = {"weights": weights}
        fields["head"] = trial.suggest_categorical("head", self.head)
        if weights not in ("keep", "int8"):
            grid = fields["grid"] = trial.suggest_categorical("grid", ["min8", "min", "sym"])
            if grid != "min8":
                fields["group_size"] = trial.suggest_categorical("group_size", [32, 64, 128])
            fields["method"] = trial.suggest_categorical("method", ["rtn", "search", "search+gptq"])
        if self.vocabulary is not None and trial.suggest_categorical("vocabulary", [False, True]):
            fields["vocabulary"] = self.vocabulary
        if self.influence is not None:
            fields |= self._pruning(trial)
        if fields.get("neurons") and weights == "keep":
            # The down projections lose columns, and so their blocks: they are rounded again.
            fields |= {"grid": "min8", "method": "search+gptq"}
        if fields.get("neurons") or fields.get("method", "rtn") != "rtn":
            fields["calibration"] = self.calibration
        return replace(self.base, **fields)

    def _pruning(self, trial: Any) -> dict[str, Any]:
        assert self.influence is not None
        fields: dict[str, Any] = {}
        if layers := trial.suggest_categorical("layers", self.depths):
            fields["removed_layers"] = format_ranges(least_influence(self.influence, layers))
        neurons = trial.suggest_categorical("neurons", self.widths)
        return fields | ({"neurons": neurons} if neurons < self.widths[0] else {})


class _Bench:
    """Exports and measures one recipe after the other, giving up early on hopeless ones."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Path,
        windows: int,
        budget: Budget,
        work: Path,
        measure: Measure,
    ) -> None:
        self.checkpoint, self.text, self.budget = checkpoint, text, budget
        self.windows, self.measure = windows, measure
        self.window = window_of(checkpoint)
        self.work = work

    def run(self, recipe: Recipe) -> Metrics:
        """What was measured before a limit broke, or all of it."""
        with aside(self.work, ".trial-") as folder:  # each worker's own
            return self._run(recipe, folder / "made" / "bundle")  # an export locks the folder above

    def _run(self, recipe: Recipe, path: Path) -> Metrics:
        metrics: Metrics = {}
        export_bundle(self.checkpoint, path, recipe)
        bundle = open_bundle(path, verify=False)
        metrics["size"] = (path / bundle.graph("auto").file).stat().st_size / 1e6
        ram = self.budget.limits.get("ram")
        if self.budget.broken(metrics) or (ram is not None and metrics["size"] > ram):
            return metrics
        ids = self._ids(path, self.window * self.windows)
        kl = self.budget.limits.get("kl")
        if kl is not None and self.windows > QUICK_WINDOWS:
            quick = self._quality(path, recipe, ids[: self.window * QUICK_WINDOWS])
            if quick["kl"] > HOPELESS * kl:
                return metrics | quick
        metrics |= self._quality(path, recipe, ids)
        return metrics | self.measure(path, self.budget)

    def _ids(self, bundle: Path, count: int) -> Sequence[int]:
        content = read_text(self.text)[: 8 * count]
        return load_tokenizer(bundle).encode(content)[:count]

    def _quality(self, bundle: Path, recipe: Recipe, ids: Sequence[int]) -> Metrics:
        session = open_session(open_bundle(bundle, verify=False), context=self.window)
        pieces: list[Ids] = windows_of(ids, self.window, self.windows)
        kept = None if recipe.vocabulary is None else parse_ranges(recipe.vocabulary)
        quality = evaluate(self.checkpoint, session, pieces, self.text, kept=kept)
        return {"kl": quality.kl, "perplexity": quality.perplexity}


def measure_here(bundle: Path, budget: Budget) -> Metrics:
    """Speed and memory on this machine: a prompt of the budget's length, then 64 tokens."""
    from pocketslm.profiling.bench import bench

    return _speeds(bench(bundle, n_prompt=[budget.prompt], n_gen=[64], repetitions=3))


def measure_on(device: str) -> Measure:
    """The same on a device, which keeps nothing of the bundle."""
    from pocketslm.profiling.devices import open_device
    from pocketslm.profiling.devices.bench import Conditions, bench_on_device
    from pocketslm.profiling.devices.runner import uninstall
    from pocketslm.profiling.plan import plan
    from pocketslm.profiling.records import Measurement

    def measure(bundle: Path, budget: Budget) -> Metrics:
        opened = open_bundle(bundle, verify=False)
        assert opened.config is not None  # we exported it
        tests = plan(opened.config.vocab_size, n_prompt=[budget.prompt], n_gen=[64])
        conditions = Conditions(repetitions=3, idle_s=0, interval_s=0)
        rows: list[Measurement] = []
        with open_device(device) as there:
            bench_on_device(
                there, [bundle], tests=tests, threads=[], conditions=conditions, keep=rows.append
            )
            uninstall(there, bundle / opened.graph("native").file)
        return _speeds(rows)

    return measure


def _speeds(rows: Sequence[Any]) -> Metrics:
    prefill, decode = rows
    return {
        "ttft": statistics.median(prefill.ttft_ns) / 1e9,
        "prefill": statistics.median(prefill.prefill_tps),
        "decode": statistics.median(decode.decode_tps),
        "ram": max(row.peak_rss_bytes or 0 for row in rows) / 1e6,
    }


def _finished(queue: Any, budget: Budget) -> list[Trial]:
    trials = []
    for trial in study.finished(queue):
        try:
            metrics = trial.user_attrs[study.METRICS]
            recipe = Recipe.from_dict(schema.loads(trial.user_attrs[study.RECIPE]))
        except (KeyError, ValueError, TypeError, UsageError, ExportError) as error:
            raise study.Unreadable(f"trial {trial.number}: {error!r:.100}") from None
        trials.append(Trial(trial.number, recipe, metrics, tuple(budget.broken(metrics))))
    return trials


def describe(recipe: Recipe) -> str:
    """The fields that a search varies, in a few words."""
    words = [f"weights {recipe.weights}", f"head {recipe.head}"]
    if recipe.weights not in ("keep", "int8", "float"):
        words[0] += f" g{recipe.group_size} {recipe.grid} {recipe.method}"
    if recipe.vocabulary is not None:
        words.append("vocabulary trimmed")
    if recipe.removed_layers is not None:
        words.append(f"without layers {recipe.removed_layers}")
    if recipe.neurons is not None:
        words.append(f"{recipe.neurons} neurons")
    return ", ".join(words)


def table(trials: Sequence[Trial]) -> str:
    """Every trial as Markdown, those of the Pareto front marked, by rising KL."""
    front = {trial.number for trial in pareto(trials)}
    names = list(METRICS)
    lines = ["| trial | recipe | " + " | ".join(names) + " | |"]
    lines.append("| ---: | --- |" + " ---: |" * len(names) + " --- |")
    for trial in sorted(trials, key=lambda trial: trial.metrics.get("kl", float("inf"))):
        cells = [
            _shown(name, trial.metrics[name]) if name in trial.metrics else "" for name in names
        ]
        mark = "; ".join(trial.broken) or ("front" if trial.number in front else "")
        lines.append(
            f"| {trial.number} | {describe(trial.recipe)} | {' | '.join(cells)} | {mark} |"
        )
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float) -> str:
    unit = METRICS[name][0]
    return f"{value:.4g} {unit}".rstrip()


def choose(trials: Sequence[Trial]) -> Trial:
    """:func:`best`, or ExportError that names the nearest miss."""
    found = best(trials)
    if found is not None:
        return found
    whole = [trial for trial in trials if "kl" in trial.metrics] or list(trials)
    if not whole:
        raise ExportError("no trial was made")
    nearest = min(whole, key=lambda trial: (len(trial.broken), trial.metrics.get("kl", 99.0)))
    raise ExportError(
        f"no recipe of {len(trials)} fits; the nearest ({describe(nearest.recipe)}) breaks "
        f"{'; '.join(nearest.broken)}: loosen the budget or try more with --trials"
    )


def write_report(trials: Sequence[Trial], budget: Budget, work: Path) -> None:
    """``plan.md``, ``pareto.svg`` and a recipe file for every trial of the Pareto front."""
    limits = ", ".join(f"{name} {_shown(name, limit)}" for name, limit in budget.limits.items())
    for trial in pareto(trials):
        (work / f"trial-{trial.number}.toml").write_text(trial.recipe.to_toml())
    text = f"# Search for: {limits}\n\n![memory and KL of the trials]({PICTURE})\n\n{table(trials)}"
    for name, content in ((PICTURE, picture(trials)), (REPORT, text)):
        with written(work / name) as part:
            part.write_text(content, encoding="utf-8")


def picture(trials: Sequence[Trial]) -> str:
    """An SVG file: KL against memory of every whole trial, with its decode speed."""
    from pocketslm.profiling import charts

    whole = [trial for trial in trials if set(OBJECTIVES) <= trial.metrics.keys()]

    def series(name: str, chosen: Sequence[Trial], colour: int | None) -> charts.Series:
        points = [(trial.metrics["ram"], trial.metrics["kl"]) for trial in chosen]
        labels = [
            f"{trial.number}: {_shown('decode', trial.metrics['decode'])}" for trial in chosen
        ]
        return charts.Series(name, points, colour, line=False, labels=labels)

    front = charts.front([(trial.metrics["ram"], trial.metrics["kl"]) for trial in whole])
    groups = [
        charts.Series("", front, None, marks=False, dashed=True),
        series("within the budget", [trial for trial in whole if not trial.broken], 0),
        series("out", [trial for trial in whole if trial.broken], None),
    ]
    chart = charts.plot(
        groups,
        charts.Axis("memory, MB", zero=False),
        charts.Axis("KL to the source, nats", log=True),
        "KL to the source by memory; beside each trial its number and decode speed",
    )
    return charts.standalone(chart)
