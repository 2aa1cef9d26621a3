"""``optimum-cli export pocketslm``: our export under optimum's command line.

optimum finds this file in its namespace ``optimum.commands.register``, where pyproject.toml
installs it; it must stay light and without an ``__init__.py`` beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

if TYPE_CHECKING:
    from argparse import ArgumentParser


class PocketSlmExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    COMMAND: ClassVar = CommandInfo(
        name="pocketslm",
        help="Export a small language model to a pocketslm bundle for phones and edge boards.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from pocketslm.export.cli import add_export_options

        parser.add_argument(
            "-m", "--model", required=True, help="a Hugging Face folder, .gguf file or catalog name"
        )
        add_export_options(parser)

    def run(self) -> None:
        from pocketslm.cli import guarded
        from pocketslm.export.cli import export

        if status := guarded(export, self.args):
            raise SystemExit(status)


REGISTER_COMMANDS = [(PocketSlmExportCommand, ExportCommand)]
