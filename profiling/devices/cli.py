"""``pocketslm device``, and ``pocketslm bench --device``."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pocketslm.terminal import (
    Commands,
    Progress,
    add_json,
    chosen,
    print_columns,
    print_json,
    refuse,
    say,
    show,
)

if TYPE_CHECKING:
    from pocketslm.profiling.devices.device import Device
    from pocketslm.profiling.devices.device import Progress as Progressing

SPECS = "local, ssh:[user@]host[:port], adb or adb:SERIAL"
_SECONDS = {
    "sustained": "seconds to repeat each test (default: -r times)",
    "pause": "seconds between tests (default: local 0, ssh 10, adb 60)",
    "idle": "seconds to watch a battery at rest first (default: 10)",
    "interval": "seconds between polls of the sensors (default: 1)",
}
# Options of `bench` that only a device takes.
ON_A_DEVICE = ("pin", *(f"{name}_s" for name in _SECONDS))


def add_commands(commands: Commands) -> None:
    device = commands.group("device", "list, look at and clean the devices to measure on")
    parser = device.add(
        "list", _list, "list what adb sees, with its state", "pocketslm device list --json"
    )
    add_json(parser)
    parser = device.add(
        "info",
        _info,
        "show a device's cores, memory, system and sensors",
        "pocketslm device info ssh:pi@board",
    )
    parser.add_argument("device", help=SPECS)
    parser.add_argument("--raw", action="store_true", help="print the text of its files instead")
    add_json(parser)
    parser = device.add(
        "clean", _clean, "remove what benchmarks left on a device", "pocketslm device clean adb"
    )
    parser.add_argument("device", help=SPECS)
    parser = commands.add(
        "tune-threads",
        _tune_threads,
        "measure how many threads a model is fastest with on a device, on which cores, for the app",
        "pocketslm tune-threads out/smollm2 --device adb",
    )
    parser.add_argument("bundle", type=Path, help="its threads.json gets the choice")
    parser.add_argument("--device", default="local", help=f"{SPECS} (default: local)")
    parser.add_argument(
        "-p", "--n-prompt", type=int, default=128, help="tokens of the prompt (default: 128)"
    )
    parser.add_argument(
        "-n", "--n-gen", type=int, default=32, help="tokens of the answer (default: 32)"
    )
    parser.add_argument(
        "-r", "--rounds", type=int, default=3, help="times to measure each choice (default: 3)"
    )
    add_json(parser)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pocketslm bench`` for running on a device."""
    group = parser.add_argument_group("on a device")
    group.add_argument(
        "--device",
        action="append",
        help=f"run the native graph there: {SPECS}; several devices are measured at once",
    )
    group.add_argument("--pin", help="cores to use: big, little, prime, all, or CPUs such as 4-7")
    for name, text in _SECONDS.items():
        group.add_argument(f"--{name}", dest=f"{name}_s", type=float, metavar="S", help=text)


def bench(arguments: argparse.Namespace) -> None:
    """Run ``pocketslm bench --device``. Rows are printed and kept even if a run is cut short."""
    from pocketslm.profiling.devices.bench import Conditions, bench_on_device
    from pocketslm.profiling.devices.shelf import measure_each
    from pocketslm.profiling.plan import SLIMLM, plan
    from pocketslm.profiling.records import Measurement, append_records
    from pocketslm.profiling.tables import format_rows
    from pocketslm.profiling.workload import document_tests
    from pocketslm.runtime.bundle import open_bundle

    where = "on a device, where only the native graph runs"
    refuse(
        arguments,
        where,
        "peer",
        "source",
        "parallel",
        *["backend"] * (arguments.backend != "native"),
    )
    if arguments.sustained_s:
        refuse(arguments, "with --sustained", "repetitions")
    conditions = Conditions(**chosen(arguments, Conditions))
    first, *_ = arguments.bundle
    configs = [open_bundle(path, verify=False).config for path in arguments.bundle]
    tests = (
        document_tests(first, arguments.documents, arguments.context)
        if arguments.documents is not None
        else plan(
            min(one.vocab_size if one else 1 for one in configs),
            n_prompt=[] if arguments.slimlm else arguments.n_prompt,
            n_gen=[] if arguments.slimlm else arguments.n_gen,
            n_depth=arguments.n_depth,
            n_both=SLIMLM if arguments.slimlm else arguments.pg,
            context=arguments.context,
        )
    )
    rows: dict[str, list[Measurement]] = {spec: [] for spec in arguments.device}

    keeping = Lock()

    def keep(spec: str, row: Measurement) -> None:
        with keeping:
            rows[spec].append(row)
            if arguments.record:
                append_records(arguments.record, [row])

    def measure(device: Device, progress: Progressing) -> None:
        bench_on_device(
            device,
            arguments.bundle,
            tests=tests,
            threads=arguments.threads,
            runs=arguments.runs,
            conditions=conditions,
            keep=partial(keep, device.name),
            progress=progress,
        )

    try:
        with Progress() as progress:
            measure_each(arguments.device, measure, progress, say)
    finally:
        measured = {spec: found for spec, found in rows.items() if found}
        if len(arguments.device) > 1 and arguments.output == "md":
            show("\n".join(f"{spec}\n\n{format_rows(r)}" for spec, r in measured.items()), end="")
        elif measured:
            everything = [row for found in measured.values() for row in found]
            show(format_rows(everything, arguments.output), end="")


def _tune_threads(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.devices import open_device
    from pocketslm.profiling.devices.tune import tune_threads

    with open_device(arguments.device) as device, Progress() as progress:
        chosen, tried = tune_threads(
            device,
            arguments.bundle,
            n_prompt=arguments.n_prompt,
            n_gen=arguments.n_gen,
            rounds=arguments.rounds,
            say=say,
            progress=progress,
        )
    if arguments.json:
        choice = {"threads": chosen.threads, "cpus": chosen.cpus}
        print_json(choice | {"milliseconds": {str(one): one.milliseconds for one in tried}})
        return
    print_columns(
        [(str(one), f"{one.milliseconds} ms", "chosen" * (one is chosen)) for one in tried]
    )


def _list(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.devices.adb import attached

    rows = attached()
    if arguments.json:
        print_json([dict(zip(("serial", "state", "model"), row, strict=True)) for row in rows])
    elif rows:
        print_columns([("adb:" + serial, state, model) for serial, state, model in rows])
    else:
        say("adb sees no device; any machine that ssh reaches is one too: ssh:user@host")


def _info(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.devices import info, open_device
    from pocketslm.profiling.sensors import sampler
    from pocketslm.profiling.sensors.tree import parse, script

    if arguments.raw:
        refuse(arguments, "with --raw", "json")
    with open_device(arguments.device) as device:
        files = tuple(dict.fromkeys((*info.FILES, *sampler.FILES)))
        text = device.shell(script(files, (*info.COMMANDS, *sampler.COMMANDS)))
        if arguments.raw:
            show(text, end="")
            return
        tree = parse(text)
        machine = info.machine(tree, device.kind)
    facts = _facts(tree)
    if arguments.json:
        print_json(dataclasses.asdict(machine) | facts)
        return
    rows = [
        ("product", machine.product or "not told"),
        ("processor", " ".join(filter(None, (machine.cpu, machine.soc and f"({machine.soc})")))),
        ("memory", f"{machine.ram_bytes / 2**30:.1f} GiB"),
        ("system", f"{machine.os}, {machine.arch}"),
    ]
    for index, cluster in enumerate(machine.clusters):
        speeds = (
            f"capacity {cluster.capacity}" if cluster.capacity else "",
            f"{cluster.max_khz / 1e6:.2f} GHz" if cluster.max_khz else "",
        )
        cpus = ",".join(map(str, cluster.cpus))
        rows.append((f"cluster {index + 1}", " ".join(filter(None, (f"CPU {cpus}", *speeds)))))
    rows.append(("governor", machine.governor or "not told"))
    celsius = ", ".join(f"{name} {value:.1f}" for name, value in facts["celsius"].items())
    rows.append(("temperatures", f"{celsius} C" if celsius else "none readable"))
    rows.append(("power", facts["power"] or "none readable"))
    if facts["throttling"]:
        rows.append(("throttling", ", ".join(facts["throttling"])))
    print_columns(rows)


def _facts(tree: dict[str, str]) -> dict[str, Any]:
    from pocketslm.profiling.sensors import power, thermal

    source = power.find_source(tree)
    return {
        "celsius": thermal.celsius(tree),
        "power": source and f"{source.name}: {source.label}",
        "throttling": thermal.throttle_reasons(tree),
    }


def _clean(arguments: argparse.Namespace) -> None:
    from pocketslm.profiling.devices import open_device

    with open_device(arguments.device) as device:
        device.clean()
        say(f"{device.folder} is gone from {device.name}")
