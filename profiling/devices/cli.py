"""``pocketslm device``: what is attached, what it is, what lies on it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pocketslm.terminal import Commands, add_json, print_columns, print_json, say

SPECS = "local, ssh:[user@]host[:port], adb or adb:SERIAL"


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

    with open_device(arguments.device) as device:
        files = tuple(dict.fromkeys((*info.FILES, *sampler.FILES)))
        text = device.shell(script(files, (*info.COMMANDS, *sampler.COMMANDS)))
        if arguments.raw:
            print(text, end="")
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
