"""The help of every subcommand of `fastpmae-eval`: `python -m tests.programs.subcommands_help`."""

import contextlib

from fastpmae.evaluate.cli import read_command

if __name__ == "__main__":
    for name in ("knn", "linear", "lowshot", "probe", "finetune"):
        with contextlib.suppress(SystemExit):
            read_command([name, "--help"])
