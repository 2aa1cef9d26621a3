"""``pocketslm plan``: the search for a recipe, which ``export --fit`` is another name of."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pocketslm.terminal import Commands, add_json, print_json, refuse_others, say, show

MODEL = "a Hugging Face folder, .gguf file or catalog name; +UPDATE adds a LoRA adapter or delta"
BUDGET = (
    "limits on this machine, such as ram=120MB,decode=250tps,ttft=1s@512,kl=0.05; the search is "
    "kept in OUT.plan"
)
# Options of `export` that a search takes too, and those that only a search takes.
SHARED = ("calibration", "vocabulary", "kv_cache", "context", "target", "overwrite", "json")
SEARCH = ("prune", "trials", "text", "storage", "device")


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "plan",
        plan,
        "find the recipe nearest to the source that fits a budget, by measurement, and export it",
        "pocketslm plan smollm2-135m-instruct out/small ram=120MB,decode=250tps",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("out", type=Path, help="the bundle folder to write")
    parser.add_argument("fit", metavar="BUDGET", help=BUDGET)
    add_search_options(parser)
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a UTF-8 file or catalog text whose end shows methods the layers' inputs (default: "
        "that of --text)",
    )
    parser.add_argument(
        "--vocabulary", metavar="TEXT", help="also try to keep only the tokens of this text"
    )
    add_shared_options(parser)


def add_search_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prune", action="store_true", help="also try to leave out layers and MLP neurons"
    )
    parser.add_argument("--trials", type=int, default=16, help="recipes to try (default: 16)")
    parser.add_argument("--text", default="lee", help="what quality is measured on (default: lee)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="the database of the trials, such as postgresql://user@host/database, which several "
        "workers may share (default: in OUT.plan)",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="measure speed and memory there: local, ssh:[user@]host[:port], adb or adb:SERIAL "
        "(default: in Python on this machine)",
    )


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What every command that writes a bundle takes."""
    parser.add_argument(
        "--kv-cache",
        choices=("fp16", "int8"),
        default="fp16",
        help="of the native and ExecuTorch graphs",
    )
    parser.add_argument("--context", type=int, help="longest sequence (default: up to 4096)")
    parser.add_argument(
        "--target",
        help="of native, onnx, onnx-pocketslm, executorch, executorch-pocketslm, joined with "
        "commas (default: native,onnx where they cover it; `plan`: native)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_json(parser)


def plan(arguments: argparse.Namespace) -> None:
    """Search for the recipe, keep the search beside the bundle, export what fits best."""
    refuse_others(arguments, "in a search for a recipe", "fit", *SEARCH, *SHARED)
    from pocketslm.export import plan
    from pocketslm.export.evaluate import evaluate_bundle
    from pocketslm.export.pipeline import export_bundle
    from pocketslm.export.recipe import Recipe
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve

    budget = plan.parse_budget(arguments.fit)
    checkpoint = open_source(arguments.model, say)
    text = resolve(arguments.text, say)
    base = Recipe(context=arguments.context, kv_cache=arguments.kv_cache, targets=("native",))
    targets = tuple(arguments.target.split(",")) if arguments.target else base.targets
    replace(base, targets=targets)  # a wrong one is an error before the search
    work = arguments.out.with_name(f"{arguments.out.name}.plan")
    trials = plan.search(
        checkpoint,
        text,
        budget,
        work,
        calibration=arguments.calibration or arguments.text,
        base=base,
        vocabulary=resolve(arguments.vocabulary, say) if arguments.vocabulary else None,
        prune=arguments.prune,
        trials=arguments.trials,
        storage=arguments.storage,
        measure=plan.measure_on(arguments.device) if arguments.device else None,
        say=say,
    )
    plan.write_report(trials, budget, work)
    chosen = plan.choose(trials)
    recipe = replace(chosen.recipe, targets=targets)
    manifest = export_bundle(
        checkpoint, arguments.out, recipe, overwrite=arguments.overwrite, say=say
    )
    evaluate_bundle(arguments.out, source=checkpoint, text=text, window=plan.window_of(checkpoint))
    if arguments.json:
        print_json(json.loads(manifest.to_json()) | {"trial": chosen.number, **chosen.metrics})
        return
    show((work / plan.REPORT).read_text())
    show(f"{arguments.out}: trial {chosen.number}, {plan.describe(chosen.recipe)}")
