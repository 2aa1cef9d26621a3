"""``pocketslm bench`` and what is made of its records."""

from __future__ import annotations

import argparse
from pathlib import Path

from pocketslm.errors import UsageError
from pocketslm.profiling.devices import cli as devices
from pocketslm.terminal import (
    Commands,
    Progress,
    add_backend,
    add_json,
    add_threads,
    depths,
    numbers,
    pair,
    print_json,
    refuse,
    say,
    show,
)

_OF_A_LENGTH = ("n_prompt", "n_gen", "n_depth", "pg", "parallel")


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "bench",
        _bench,
        "measure speed, memory and load time, alone or beside other runtimes",
        "pocketslm bench out/smollm2 -p 512 -n 128 -r 5 -t 2 --peer ort-genai",
    )
    parser.add_argument("bundle", type=Path, nargs="*")
    parser.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="NAME",
        help="also a catalog model in its shape with random weights (native, int4 with an int8 "
        "head): its speed and memory before its weights are fetched",
    )
    parser.add_argument("-p", "--n-prompt", type=numbers, default=[512], help="prompt lengths")
    parser.add_argument("-n", "--n-gen", type=numbers, default=[128], help="generation lengths")
    parser.add_argument("-d", "--n-depth", type=depths, help="tokens cached before generation")
    parser.add_argument(
        "-pg", type=pair, action="append", default=[], metavar="P,N", help="a prompt, then tokens"
    )
    parser.add_argument(
        "--slimlm",
        action="store_true",
        help="only the table of the SlimLM paper: prompts of 1 to 800 tokens, each with an answer",
    )
    parser.add_argument(
        "--documents",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="only the document task: what the assistant asks when it summarises these files, "
        "suggests questions and answers one (default: the document that ships with it)",
    )
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1, help="repeat everything, in new processes")
    parser.add_argument("--cold", action="store_true", help="load from storage, not page cache")
    parser.add_argument("-t", "--threads", type=numbers, default=[], help="numbers of threads")
    parser.add_argument("-o", "--output", choices=("md", "json", "jsonl", "csv"), default="md")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=ARTEFACT]",
        help="also run ort-genai, llama.cpp, llama.cpp-q4_0 or executorch, or all that are "
        "installed, and print the ratio",
    )
    parser.add_argument("--source", help="the checkpoint from which peers make their artefact")
    parser.add_argument("--context", type=int, help="a KV cache larger than the tests need")
    parser.add_argument(
        "--parallel",
        type=numbers,
        default=[],
        metavar="N,...",
        help="also generate so many texts at once (native): tokens a second of all, and the time "
        "between two tokens of one",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE.jsonl", help="append every measurement to this file"
    )
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        type=float,
        default=600.0,
        help="seconds a repetition may take (default: 600)",
    )
    parser.add_argument(
        "--backend", default="auto", help="one or several, as native,onnx (default: the first)"
    )
    parser.add_argument(
        "--operators", action="store_true", help="add a repetition that times each operator"
    )
    devices.add_bench_options(parser)

    parser = commands.add(
        "shapes",
        _shapes,
        "measure which shape of a model is fast on a device, at as many parameters",
        "pocketslm shapes --parameters 135M --chart shapes.svg",
    )
    parser.add_argument("--parameters", required=True, help="such as 135M or 1.1B")
    parser.add_argument(
        "--family",
        default="smollm2-135m-instruct",
        metavar="NAME",
        help="the catalog model whose shape is varied (default: smollm2-135m-instruct)",
    )
    parser.add_argument("--device", default="local", help=f"{devices.SPECS} (default: local)")
    parser.add_argument("--pin", help="cores to use: big, little, prime, all, or CPUs such as 4-7")
    parser.add_argument(
        "-p", "--n-prompt", type=int, default=128, help="of a prompt (default: 128)"
    )
    parser.add_argument("-n", "--n-gen", type=int, default=32, help="(default: 32)")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw them")
    add_threads(parser)
    add_json(parser)

    parser = commands.add(
        "bench-doc",
        _bench_doc,
        "measure what the document assistant quotes, cites, says, refuses, summarises and suggests",
        "pocketslm bench-doc out/smollm2 --embeddings out/minilm --json",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--embeddings",
        type=Path,
        nargs="+",
        default=[],
        help="bundles of embeddings (default: find by words only)",
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="let the model answer every question, not a sample",
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="use the half of the questions on which constants were chosen, not the other half",
    )
    parser.add_argument(
        "--examples", action="store_true", help="print each question with what is shown"
    )
    add_backend(parser)
    add_threads(parser)
    add_json(parser)

    parser = commands.add(
        "compare",
        _compare,
        "tell which tests of two records differ, as far as the noise allows",
        "pocketslm compare both.jsonl",
    )
    parser.add_argument("a", help="records of `bench --runs 10 --record`, or llama-bench's JSON")
    parser.add_argument("b", nargs="?", help="the records of B (default: the second bundle in A)")

    parser = commands.add(
        "fit",
        _fit,
        "predict memory and speed of every catalog model on a device, before exporting any",
        "pocketslm fit --ram 4GB --bandwidth 30GB/s --int8 300GMAC/s",
    )
    parser.add_argument(
        "--ram", help="memory that the model may use (default: all of the device's)"
    )
    parser.add_argument(
        "--bandwidth", help="speed of streaming reads, such as 30GB/s (default: measured)"
    )
    parser.add_argument(
        "--int8", help="int8 multiply-accumulates, such as 300GMAC/s (default: measured)"
    )
    parser.add_argument(
        "--records",
        metavar="FILE.jsonl",
        help="records of `bench --record` on the device, which give its limits, the share of them "
        "that it reaches, and the error of each prediction",
    )
    parser.add_argument("-c", "--context", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    add_threads(parser)
    add_json(parser)

    parser = commands.add(
        "report",
        _report,
        "make a page of records: tables, curves, roofline, memory, energy",
        "pocketslm report phone.jsonl laptop.jsonl -o report.html",
    )
    parser.add_argument(
        "records", nargs="+", help="files of `bench --record`, or llama-bench's JSON"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="*.html, *.md or *.csv"
    )


def _bench(arguments: argparse.Namespace) -> None:
    if not arguments.random:
        if not arguments.bundle:
            raise UsageError("nothing to measure; give a bundle, or --random with a catalog name")
        _bench_bundles(arguments)
        return
    refuse(arguments, "with --random, whose weights say nothing", "documents", "peer")
    from pocketslm.profiling.shape import catalog_config, random_bundles

    with random_bundles([(name, catalog_config(name)) for name in arguments.random]) as made:
        arguments.bundle = [*arguments.bundle, *made]
        _bench_bundles(arguments)


def _bench_bundles(arguments: argparse.Namespace) -> None:
    if arguments.documents is not None:
        refuse(arguments, "with --documents", "slimlm", *_OF_A_LENGTH)
    if arguments.slimlm:
        refuse(arguments, "with --slimlm", *_OF_A_LENGTH)
    if arguments.device:
        devices.bench(arguments)
        return
    refuse(arguments, "without --device", *devices.ON_A_DEVICE)
    if not arguments.peer:
        refuse(arguments, "without --peer", "source")
    from pocketslm.models.catalog import resolve
    from pocketslm.profiling import plan
    from pocketslm.profiling.bench import bench
    from pocketslm.profiling.tables import format_rows
    from pocketslm.profiling.workload import document_tests

    tests = None
    if arguments.documents is not None:
        tests = document_tests(arguments.bundle[0], arguments.documents, arguments.context)
    with Progress() as progress:
        rows = bench(
            *arguments.bundle,
            n_prompt=[] if arguments.slimlm else arguments.n_prompt,
            n_gen=[] if arguments.slimlm else arguments.n_gen,
            n_depth=arguments.n_depth,
            n_both=plan.SLIMLM if arguments.slimlm else arguments.pg,
            tests=tests,
            repetitions=arguments.repetitions,
            runs=arguments.runs,
            threads=arguments.threads,
            backends=arguments.backend.split(","),
            cold=arguments.cold,
            operators=arguments.operators,
            context=arguments.context,
            parallel=arguments.parallel,
            timeout_s=arguments.timeout_s,
            record=arguments.record,
            peers=arguments.peer,
            source=resolve(arguments.source, say) if arguments.source else None,
            say=say,
            progress=progress,
        )
    show(format_rows(rows, arguments.output), end="")


def _shapes(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling import shapes
    from pocketslm.profiling.devices.bench import Conditions

    count = shapes.parse_parameters(arguments.parameters)
    swept = shapes.sweep(shapes.family(arguments.family), count)
    with Progress() as progress:
        found = shapes.measure(
            swept,
            arguments.device,
            n_prompt=arguments.n_prompt,
            n_gen=arguments.n_gen,
            threads=[arguments.threads] if arguments.threads else [],
            conditions=Conditions(repetitions=arguments.repetitions, pin=arguments.pin),
            progress=progress,
        )
    if arguments.chart is not None:
        arguments.chart.write_text(shapes.chart(found), encoding="utf-8")
    if arguments.json:
        print_json([one.to_dict() for one in found])
    else:
        show(shapes.table(found), end="")


def _bench_doc(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from pocketslm.models.catalog import fetch
    from pocketslm.profiling.assistant import format_report, measure
    from pocketslm.runtime.model import Model

    model = Model.load(arguments.bundle, arguments.backend, arguments.threads)
    model.need_head("bench-doc")
    embedders = [Model.load(bundle) for bundle in arguments.embeddings]

    def example(text: str) -> None:
        for line in text.splitlines() if arguments.examples else ():
            say(line)

    with Progress() as progress:
        figures = measure(
            model,
            fetch("lee", say),
            fetch("wiki", say),
            progress,
            embedders=embedders,
            every=arguments.every,
            tuned=arguments.tuned,
            examples=example,
        )
    if arguments.json:
        print_json(
            {
                "model": model.name,
                "backend": model.backend,
                "embeddings": [embedder.name for embedder in embedders],
                "questions": "tuned" if arguments.tuned else "apart",
                "figures": [asdict(figure) for figure in figures],
            }
        )
    else:
        show(f"{model.name}, {model.backend}")
        show(format_report(figures), end="")


def _compare(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.compare import LEAST_RUNS, compare, compare_table, compare_two
    from pocketslm.profiling.llama_bench import read_rows

    rows = read_rows(arguments.a)
    differences = compare(rows, read_rows(arguments.b)) if arguments.b else compare_two(rows)
    show(compare_table(differences), end="")
    if any(one.low is None for one in differences):
        say(f"fewer than {LEAST_RUNS} runs on a side say nothing: measure with `bench --runs 10`")
    elif any(not one.in_turns for one in differences):
        say("runs taken in turns tell more: `bench A B --runs 10 --record FILE`")


def _fit(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.fit import fit, fit_dict, format_fit

    stated = arguments.bandwidth is not None and arguments.int8 is not None
    if stated and not arguments.records:
        refuse(arguments, "where bandwidth and int8 are stated", "threads")
    if not stated:  # only one of the two was stated
        where = "without --int8" if arguments.bandwidth else "without --bandwidth"
        refuse(arguments, where, "bandwidth", "int8")
    found = fit(
        arguments.ram,
        arguments.bandwidth,
        arguments.int8,
        arguments.records,
        arguments.threads,
        arguments.context,
        arguments.prompt,
        say,
    )
    print_json(fit_dict(*found)) if arguments.json else show(format_fit(*found), end="")


def _report(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.report import write_report

    count = write_report(arguments.records, arguments.output)
    say(f"{arguments.output}: {count} measurements")
