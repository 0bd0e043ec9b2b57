"""The help of every command, as JSON by its name: `python -m tests.programs.helps`."""

import contextlib
import importlib
import io
import json
import sys

from fastpmae.evaluate.cli import read_command
from tests.made import COMMANDS_AT

SUBCOMMANDS = ("knn", "linear", "lowshot", "probe", "finetune")
"""Those of `fastpmae-eval`, each with flags of its own."""


def help_of(command: str) -> str:
    module, function = COMMANDS_AT[command].split(":")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if command == "fastpmae-eval":
            for name in SUBCOMMANDS:
                with contextlib.suppress(SystemExit):
                    read_command([name, "--help"])
        else:
            sys.argv = [command, "--help"]
            try:
                status = getattr(importlib.import_module(module), function)()
            except SystemExit as ended:
                status = ended.code
            assert not status, command
    return said.getvalue()


if __name__ == "__main__":
    print(json.dumps({command: help_of(command) for command in COMMANDS_AT}))
