"""``python -m tests.fuzz``: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import campaign
from .worker import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=campaign.__doc__)
    parser.add_argument("--minutes", type=float, default=1, help="of all targets together")
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        type=lambda text: text.split(","),
        help=f"some of {', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument("--inputs", type=int, help="so many of each, in place of --minutes")
    parser.add_argument("--turn", type=float, default=60, help="seconds a target runs at a time")
    parser.add_argument(
        "--state",
        type=Path,
        default=campaign.STATE,
        help="where seeds, totals and findings are kept",
    )
    parser.add_argument(
        "--coverage", action="store_true", help="say which lines so many inputs reach"
    )
    parser.add_argument(
        "--total", action="store_true", help="print the totals of all runs, and end"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="feed one input that was kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if arguments.total:
        print(campaign.table(campaign.read_totals(arguments.state)))
        return 0
    if arguments.replay:
        return campaign.replay(arguments.state, arguments.replay)
    if arguments.coverage:
        from . import lines

        print(lines.measure(arguments.state, arguments.targets, arguments.inputs or 2000))
        return 0
    return campaign.run(
        arguments.state, arguments.targets, arguments.minutes, arguments.inputs, arguments.turn
    )


if __name__ == "__main__":
    sys.exit(main())
