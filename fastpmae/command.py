"""The command line of `fastpmae-train`: every setting is a flag, over a preset, a file or the run that is resumed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastpmae.checkpoint import find_checkpoint, read_progress
from fastpmae.config import PRESETS, Config, config_from, preset, read_config
from fastpmae.errors import UserError
from fastpmae.run import run_of

DESCRIPTION = f"""Pretrain a vision transformer with Pseudo-MAE on a .beton file.

Settings start from a preset ({", ".join(PRESETS)}), from a file (--config) or, when a run is resumed, from that run;
flags change them one by one. Example: fastpmae-train --beton imagenet.beton --preset paper --out runs/first"""


@dataclass(frozen=True)
class Command:
    """What stands on the command line."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path | None = None
    """Start from the settings in this file (a run's config.json) instead of a preset."""


def read_command(arguments: Sequence[str] | None = None) -> Config:
    """The settings that a command line asks for; tyro ends the process with status 2 for flags it does not know.

    Raises:
        UserError: for a preset, config or checkpoint that cannot be read.
    """
    words = _with_values(list(sys.argv[1:] if arguments is None else arguments))
    command = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Command),
        prog="fastpmae-train",
        description=DESCRIPTION,
        args=words,
        default=Command(_base(words)),
    )
    return command.settings


def _base(words: list[str]) -> Config:
    """The settings that the flags change."""
    config, name, resume, out = (_value(words, flag) for flag in ("--config", "--preset", "--resume", "--out"))
    if config is not None:
        if name is not None:
            raise UserError("--config and --preset both name the settings to start from: leave one out")
        return read_config(Path(config))
    if name is not None:
        return preset(name)
    if resume is not None:
        path = Path(out) if resume == "auto" and out is not None else Path(resume)
        folder = run_of(path)
        if folder is not None and (folder / "config.json").exists():
            return read_config(folder / "config.json").using(resume=None, out=None, steps=None)
        if resume != "auto":
            found = path if path.is_file() else find_checkpoint(path).path
            return config_from(read_progress(found)["config"], str(found)).using(steps=None, out=None)
    return PRESETS["paper"]


def _with_values(words: list[str]) -> list[str]:
    """`--resume` alone means `--resume auto`."""
    spread = []
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        spread += [flag, value] if equals and flag.startswith("--") else [word]
        follows = words[position + 1 : position + 2]
        if word == "--resume" and (not follows or follows[0].startswith("-")):
            spread.append("auto")
    return spread


def _value(words: list[str], flag: str) -> str | None:
    """The word after the last `flag`."""
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None
