"""``pocketslm export`` and ``eval``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.errors import UsageError
from pocketslm.export import plan_cli
from pocketslm.export.plan_cli import MODEL
from pocketslm.terminal import (
    Commands,
    Progress,
    add_backend,
    add_json,
    add_threads,
    chosen,
    given,
    print_json,
    record_given,
    refuse,
    refuse_others,
    say,
    show,
)

if TYPE_CHECKING:
    from pocketslm.export.quantize.grid import Kind
    from pocketslm.export.recipe import Recipe
    from pocketslm.models.checkpoint import Checkpoint


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "export",
        export,
        "make a bundle of a checkpoint",
        "pocketslm export smollm2-135m-instruct out/smollm2",
    )
    parser.add_argument("model", help=MODEL)
    add_export_options(parser)
    plan_cli.add_commands(commands)

    parser = commands.add(
        "prune",
        _prune,
        "take whole layers, or parts of every layer, out of a checkpoint",
        "pocketslm prune smollm2-135m-instruct pruned --layers 3",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--layers", type=int, help="how many layers to remove (default: 0)")
    parser.add_argument(
        "--by",
        choices=("sleb", "influence", "last"),
        help="the loss without them, one by one, their influence, or their place (default: sleb)",
    )
    parser.add_argument(
        "--share", action="store_true", help="keep every second layer, and run it twice"
    )
    parser.add_argument(
        "--kv-heads", type=int, help="how many each layer keeps, with their queries"
    )
    parser.add_argument("--neurons", type=int, help="how many MLP neurons each layer keeps")
    parser.add_argument("--channels", type=int, help="how many hidden channels the model keeps")
    parser.add_argument(
        "--adaptive",
        type=float,
        metavar="SHARE",
        help="of the layers' weights to remove, such as 0.2: KV heads and neurons, more from "
        "layers that do less (Adapt-Pruner); neurons stay multiples of 32",
    )
    parser.add_argument(
        "--uniform", action="store_true", help="--adaptive: the same from every layer"
    )
    parser.add_argument(
        "--sparse",
        metavar="PATTERN",
        help="set weights to zero by Wanda: a share of each row (0.5), or all but 2 of every 4 "
        "(2:4); no target is smaller or faster for it",
    )
    parser.add_argument(
        "--text", default="lee", help="a UTF-8 file or catalog text whose end shows what matters"
    )
    parser.add_argument("--tokens", type=int, help="of the text (default: 8192)")
    add_json(parser)

    parser = commands.add(
        "methods",
        _methods,
        "compare compression methods on a model: quality and size, as tables",
        "pocketslm methods smollm2-135m-instruct --table depth",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--table",
        choices=("quantize", "bits", "depth", "width", "adaptive", "sparse", "all"),
        default="all",
        help="which methods (default: all)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("methods.jsonl"),
        help="where rows are kept; a run goes on from it (default: methods.jsonl)",
    )
    parser.add_argument(
        "--only", default="", help="rows with this in their name, such as 'gptq min g128'"
    )
    parser.add_argument(
        "--chart", type=Path, metavar="FILE.svg", help="draw the table bits: KL against bytes"
    )
    parser.add_argument("--text", default="lee", help="to measure with: its start (default: lee)")
    parser.add_argument("--calibration", default="mix", help="its end shows what matters")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens (default: 16)")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate (default: 8192)")
    add_json(parser)

    parser = commands.add(
        "heal",
        _heal,
        "train a pruned or rounded model on the answers of the one it was made from",
        "pocketslm heal pruned healed --teacher smollm2-135m-instruct --steps 200",
    )
    parser.add_argument("student", help=MODEL)
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--teacher", required=True, help="the checkpoint it was made from")
    parser.add_argument("--text", default="lee", help="a UTF-8 file or catalog text (default: lee)")
    parser.add_argument(
        "--held-out",
        type=int,
        default=8192,
        help="tokens at the text's start that are left for `eval` (default: 8192)",
    )
    parser.add_argument("--steps", type=int, help="(default: 200)")
    parser.add_argument(
        "--batch",
        type=int,
        help="sequences a step, of all processes that `torchrun` started (default: 4)",
    )
    parser.add_argument("--sequence", type=int, help="tokens each (default: 256)")
    parser.add_argument("--learning-rate", type=float, help="(default: 0.0002)")
    parser.add_argument(
        "--lora-rank",
        type=int,
        help="train low-rank updates (default: all); SPP's, usually 16, for a sparse student",
    )
    parser.add_argument("--hidden", action="store_true", help="match the last hidden state too")
    parser.add_argument(
        "--adaptive",
        type=float,
        metavar="SHARE",
        help="of the layers' weights to remove while it learns, as `prune --adaptive` does at once",
    )
    parser.add_argument("--stages", type=int, help="of --adaptive (default: 4)")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, if it is faster")
    parser.add_argument("--seed", type=int, help="(default: 0)")

    parser = commands.add(
        "delta",
        _delta,
        "keep a fine-tuned model as a small difference from its base (Delta-CoMe)",
        "pocketslm delta smollm2-135m-instruct tuned tuned.delta",
    )
    parser.add_argument("base", help=MODEL)
    parser.add_argument("tuned", help="the checkpoint that was tuned from it")
    parser.add_argument("out", type=Path, help="the file to write; BASE+OUT is the model again")
    parser.add_argument(
        "--bands",
        help="singular vectors by bits, 2, 3, 4, 8, or 32 for exact ones (default: 2x8,32x3, then "
        "2 bits up to a quarter of the rank)",
    )
    parser.add_argument(
        "--text", default="lee", help="a UTF-8 file or catalog text whose end shows what matters"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (default: 4096)")

    parser = commands.add(
        "eval",
        _eval,
        "measure a bundle's quality against its source, and write it into the bundle",
        "pocketslm eval out/smollm2",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--source",
        help="the checkpoint it was made from, or that was pruned or healed from (default: the "
        "nearest that the catalog has)",
    )
    parser.add_argument("--text", default="lee", help="a UTF-8 file or catalog text (default: lee)")
    parser.add_argument(
        "--task", type=Path, metavar="FILE.jsonl", help="score multiple-choice items instead"
    )
    parser.add_argument("--sample", type=int, help="items of the task, drawn (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--save", type=Path, metavar="RUNS.jsonl", help="add this run over the whole task to a file"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="RUNS.jsonl",
        help="draw the sample evenly over how hard the items were for the runs saved there",
    )
    parser.add_argument("--window", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--windows", type=int, default=16, help="how many windows (default: 16)")
    add_backend(parser)
    add_threads(parser)
    add_json(parser)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What export takes beside the model; optimum's command takes the same."""
    record_given(parser)
    parser.add_argument("out", type=Path, help="the bundle folder to write")
    schemes = ("keep", "int2", "int3", "int4", "int5", "int6", "int8", "float")
    parser.add_argument(
        "--weights",
        choices=schemes,
        help="keep (default) carries quantized source blocks exactly and rounds float weights to "
        "int4 (int8 in a model of embeddings); int4 is the default with --method",
    )
    parser.add_argument(
        "--head",
        choices=schemes,
        default="keep",
        help="embedding and output head; keep rounds a float one to int8",
    )
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument(
        "--grid",
        choices=("sym", "zp", "min", "min8"),
        help="offset of a group: none, a zero point, a float minimum, or one stored in 8 bits, "
        "as the scale then is (default: sym; min for hqq; min8 with --size)",
    )
    parser.add_argument(
        "--method",
        help="rtn, search or hqq, +gptq, +awq, +tune, such as search+gptq (default: rtn)",
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a UTF-8 file or catalog text whose end shows gptq, awq, search and tune the layers' "
        "inputs, or mix: Wikipedia, news, and chats of trivia and coding (default where one is "
        "needed: mix)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="TEXT",
        help="keep only the tokens that a UTF-8 file or catalog text uses, bytes and special ones",
    )
    parser.add_argument("--vocabulary-size", type=int, help="keep at most so many, by frequency")
    parser.add_argument(
        "--calibration-tokens", type=int, default=16384, help="of it (default: 16384)"
    )
    parser.add_argument(
        "--size",
        "--size-budget",
        dest="size_budget",
        type=float,
        metavar="MB",
        help="of all weights: each matrix gets the bits, from 2 to 8, that buy the most of it, "
        "measured (with it, --method is search+gptq unless said otherwise)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="carry a LoRA adapter of PEFT beside the weights, for `run --adapter NAME`; "
        "MODEL+FOLDER merges it instead",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="a recipe.toml, such as every bundle has, in place of the options above",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of the ONNX graph"
    )
    plan_cli.add_shared_options(parser)
    search = parser.add_argument_group("the same as `pocketslm plan`")
    search.add_argument("--fit", metavar="BUDGET", help=plan_cli.BUDGET)
    plan_cli.add_search_options(search)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The options as a recipe; some defaults follow the method."""
    from pocketslm.export.recipe import CALIBRATED, Recipe

    sized, method = arguments.size_budget is not None, _method(arguments)
    parts = set(method.split("+"))
    grid: Kind = "min" if "hqq" in parts or sized else "sym"
    if sized and arguments.group_size == 32:
        grid = "min8"
    return Recipe(
        weights=arguments.weights or ("int4" if arguments.method else "keep"),
        head=arguments.head,
        group_size=arguments.group_size,
        grid=arguments.grid or grid,
        method=method,
        calibration=arguments.calibration or ("mix" if parts & {*CALIBRATED} else None),
        calibration_tokens=arguments.calibration_tokens,
        dtype=arguments.dtype,
        kv_cache=arguments.kv_cache,
        context=arguments.context,
        targets=tuple(arguments.target.split(",")) if arguments.target else None,
    )


def _method(arguments: argparse.Namespace) -> str:
    unsaid = "rtn" if arguments.size_budget is None else "search+gptq"
    return arguments.method or unsaid


def _check_options(arguments: argparse.Namespace) -> None:
    """UsageError for an option that has no part in this export."""
    refuse(arguments, "without --fit", *plan_cli.SEARCH)
    if arguments.recipe:
        beside = ("recipe", "size_budget", "adapter", "overwrite", "json")
        refuse_others(arguments, "with --recipe, which says it", *beside)
    if arguments.vocabulary is None:
        refuse(arguments, "without --vocabulary", "vocabulary_size")
    if arguments.weights == arguments.head == "float":
        refuse(arguments, "with float weights and head", "grid", "group_size", "method")
    if arguments.size_budget is not None:
        refuse(arguments, "with --size, which chooses the bits", "weights", "head")
    parts = set(_method(arguments).split("+"))
    if parts == {"rtn"} or parts == {"hqq"}:
        where = f"with the method {arguments.method or 'rtn'}, which reads no text"
        if arguments.size_budget is None:
            refuse(arguments, where, "calibration")
        refuse(arguments, where, "calibration_tokens")
    if arguments.target:
        targets = set(arguments.target.split(","))
        if "onnx" not in targets:
            refuse(arguments, "without the target onnx", "dtype")
        if targets == {"onnx"}:
            refuse(arguments, "with the target onnx alone", "kv_cache")


def export(arguments: argparse.Namespace) -> None:
    if arguments.fit is not None:
        plan_cli.plan(arguments)
        return
    _check_options(arguments)
    from pocketslm.export.pipeline import export_bundle
    from pocketslm.export.prune.vocabulary import format_ranges, tokens_of
    from pocketslm.export.recipe import read_recipe
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve

    recipe = read_recipe(arguments.recipe) if arguments.recipe else _recipe(arguments)
    start = time.perf_counter()
    checkpoint = open_source(arguments.model, say)
    if arguments.vocabulary is not None:
        kept = tokens_of(checkpoint, resolve(arguments.vocabulary, say), arguments.vocabulary_size)
        recipe = replace(recipe, vocabulary=format_ranges(kept))
    with Progress() as progress:
        if arguments.size_budget is not None:
            recipe = _within(arguments.size_budget, checkpoint, recipe, progress)
        manifest = export_bundle(
            checkpoint,
            arguments.out,
            recipe,
            adapters=arguments.adapter,
            overwrite=arguments.overwrite,
            progress=progress,
            say=say,
        )
    seconds = time.perf_counter() - start
    if arguments.json:
        print_json(json.loads(manifest.to_json()) | {"seconds": seconds})
        return
    weights = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in manifest.weights.items())
    show(f"{arguments.out}: {manifest.size_bytes / 1e6:.1f} MB in {seconds:.1f} s ({weights})")
    for note in manifest.notes:
        show(f"note: {note}")


def _within(megabytes: float, checkpoint: Checkpoint, recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe with the bits of each matrix, by KL on the calibration text."""
    from pocketslm.export.calibration_text import MIX, calibration_windows
    from pocketslm.export.prune.vocabulary import TrimmedVocabulary, parse_ranges
    from pocketslm.export.quantize.sensitivity import mixed_precision
    from pocketslm.runtime.tokenizer import load_tokenizer_files

    checkpoint.config.need_head("--size")
    if recipe.vocabulary is not None:
        checkpoint = TrimmedVocabulary(checkpoint, parse_ranges(recipe.vocabulary))
    tokenizer = load_tokenizer_files(checkpoint.tokenizer_files())
    text, tokens = recipe.calibration or MIX, recipe.calibration_tokens
    window = min(256, checkpoint.config.max_position_embeddings)
    ids = calibration_windows(text, tokenizer, tokens, window, say)

    def measured(fraction: float) -> None:
        progress("measure sensitivity", fraction)

    return mixed_precision(checkpoint, recipe, ids, megabytes, measured)


def _prune(arguments: argparse.Namespace) -> None:
    from pocketslm.export.prune.folder import PruneConfig, prune_folder
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve

    if not arguments.layers:
        refuse(arguments, "without --layers", "by")
    if arguments.adaptive is None:
        refuse(arguments, "without --adaptive", "uniform")
    looked_at = given(arguments).keys() & {"kv_heads", "neurons", "channels", "adaptive", "sparse"}
    if not looked_at and arguments.by == "last":
        refuse(arguments, "with --by last, which reads no text", "text", "tokens")
    config = PruneConfig(**chosen(arguments, PruneConfig))
    source = open_source(arguments.model, say)
    text = resolve(arguments.text, say)
    with Progress() as progress:
        pruned = prune_folder(
            source, arguments.out, config, text, lambda fraction: progress("prune", fraction)
        )
    if arguments.json:
        print_json({"out": str(arguments.out), "config": pruned.config.to_dict()})
        return
    for note in pruned.notes:
        show(f"note: {note}")
    widths = [layer.mlp.width for layer in pruned.config.layers]
    heads = [a.kv_heads for a in pruned.config.attentions]
    show(
        f"{arguments.out}: {pruned.config.num_hidden_layers} layers of {_span(heads)} KV heads and "
        f"{_span(widths)} neurons, hidden size {pruned.config.hidden_size}"
    )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _methods(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from pocketslm.export import bits, methods
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve

    if arguments.table not in ("bits", "all"):
        refuse(arguments, "without --table bits", "chart")
    bench = methods.Workbench(
        open_source(arguments.model, say),
        resolve(arguments.text, say),
        arguments.calibration,
        windows=arguments.windows,
        tokens=arguments.tokens,
        say=say,
    )
    tables = methods.TABLES if arguments.table == "all" else (arguments.table,)
    found = methods.rows(bench, arguments.results, tables, say, arguments.only)
    if arguments.chart is not None:
        arguments.chart.write_text(bits.chart(found), encoding="utf-8")
    if arguments.json:
        print_json([asdict(row) for row in found])
    else:
        show(methods.markdown(found))


def _heal(arguments: argparse.Namespace) -> None:
    from pocketslm.export.heal import HealConfig, heal_folder
    from pocketslm.export.source import open_source
    from pocketslm.export.team import joined
    from pocketslm.models.catalog import resolve

    if arguments.adaptive is None:
        refuse(arguments, "without --adaptive", "stages")
    start = time.perf_counter()
    with joined() as team, Progress() as progress:
        tell = say if team.leads else lambda message: None
        losses = heal_folder(
            open_source(arguments.student, tell),
            open_source(arguments.teacher, tell),
            resolve(arguments.text, tell),
            arguments.out,
            HealConfig(**chosen(arguments, HealConfig)),
            held_out=arguments.held_out,
            progress=lambda step, steps, kl: progress(f"heal, KL {kl:.3f}", step / steps),
            team=team,
        )
    if not team.leads:
        return
    seconds = time.perf_counter() - start
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    among = f" in {team.size} processes" if team.size > 1 else ""
    show(
        f"{arguments.out}: KL {first:.3f} -> {last:.3f} nats on its text in {seconds:.0f} s{among}"
    )


def _delta(arguments: argparse.Namespace) -> None:
    from pocketslm.export.calibration_text import last_tokens
    from pocketslm.export.delta import make_delta, parse_bands
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve
    from pocketslm.runtime.tokenizer import load_tokenizer_files

    bands = None if arguments.bands is None else parse_bands(arguments.bands)
    base, tuned = open_source(arguments.base, say), open_source(arguments.tuned, say)
    files = tuned.tokenizer_files()
    window = max(1, min(512, tuned.config.max_position_embeddings, arguments.tokens))
    encode = load_tokenizer_files(files).encode
    ids = last_tokens(resolve(arguments.text, say), encode, arguments.tokens, window)
    with Progress() as progress:
        size = make_delta(
            base,
            tuned,
            arguments.out,
            bands,
            ids,
            lambda done, total: progress("split differences", done / total),
        )
    show(f"{arguments.out}: {size / 1e6:.1f} MB; the model is {arguments.base}+{arguments.out}")


def _eval_task(arguments: argparse.Namespace) -> None:
    refuse(arguments, "with --task", "source", "text", "window", "windows")
    if arguments.sample is None:
        refuse(arguments, "without --sample", "earlier", "seed")
    from pocketslm.export.tasks import evaluate_task, read_items, read_margins, save_margins
    from pocketslm.runtime.backends import open_session
    from pocketslm.runtime.bundle import open_bundle
    from pocketslm.runtime.tokenizer import load_tokenizer

    items = read_items(arguments.task)
    if arguments.save and arguments.sample is not None:
        raise UsageError("--save keeps runs over a whole task; leave out --sample")
    earlier = read_margins(arguments.earlier, items) if arguments.earlier else []
    bundle = open_bundle(arguments.bundle)
    if bundle.config is not None:
        bundle.config.need_head("eval --task")
    session = open_session(bundle, arguments.backend, arguments.threads)
    with Progress() as progress:
        result, margins = evaluate_task(
            session,
            load_tokenizer(arguments.bundle).encode,
            arguments.task.stem,
            items,
            sample=arguments.sample,
            seed=arguments.seed,
            earlier=earlier,
            progress=lambda done, total: progress("score", done / total),
        )
    if arguments.save:
        save_margins(arguments.save, items, margins)
    if arguments.json:
        print_json(result.to_dict())
        return
    for name in ("acc", "acc_norm"):
        value, error, ci = (getattr(result, name + part) for part in ("", "_stderr", "_ci95"))
        interval = f", of all {result.total} items ± {ci:.4f} (95 %)" if ci else ""
        show(f"{name:8} {value:.4f} ± {error:.4f}{interval}")
    show(f"over {result.items} of {result.total} items of {result.task}")


def _eval(arguments: argparse.Namespace) -> None:
    if arguments.task is not None:
        _eval_task(arguments)
        return
    refuse(arguments, "without --task", "sample", "seed", "save", "earlier")
    from pocketslm.export.evaluate import evaluate_bundle
    from pocketslm.export.source import open_source
    from pocketslm.models.catalog import resolve

    with Progress() as progress:
        quality = evaluate_bundle(
            arguments.bundle,
            source=open_source(arguments.source, say) if arguments.source else None,
            text=resolve(arguments.text, say),
            window=arguments.window,
            windows=arguments.windows,
            backend=arguments.backend,
            threads=arguments.threads,
            progress=lambda done, total: progress("evaluate", done / total),
        )
    if arguments.json:
        print_json(quality.to_dict())
        return
    change = quality.perplexity / quality.source_perplexity - 1
    show(
        f"perplexity {quality.perplexity:.3f} ({quality.source} {quality.source_perplexity:.3f}, "
        f"{change:+.2%})\nmean KL    {quality.kl:.5f} nats\ntop-1      {quality.top1:.2%} agree\n"
        f"over {quality.tokens} tokens of {quality.corpus} in windows of {quality.window}"
    )
