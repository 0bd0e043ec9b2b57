"""The command line of `fastpmae-train`: every setting is a flag, over a preset, a file or the run that is resumed."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastpmae.config import Config
from fastpmae.config_file import read_config
from fastpmae.presets import PRESETS, preset
from fastpmae.renamed import SETTINGS, refuse_old_flags
from fastpmae.run.checkpoint import CheckpointError, checkpoints_in, read_progress, settings_in
from fastpmae.run.folder import run_of
from fastpmae.run.shards import is_sharded
from fastpmae.run.stored_run import brought_here, resumed_from
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.words import last_value, numbers_on, with_values
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import Typed, local_path

DESCRIPTION = f"""Pretrain a vision transformer with Pseudo-MAE on a .beton file.

Settings start from a preset ({", ".join(PRESETS)}), from a file (--config) or, when a run is resumed, from that run;
flags change them one by one. Example: fastpmae-train --beton imagenet.beton --preset paper --out runs/first"""


@dataclass(frozen=True)
class Command(Typed):
    """What stands on the command line."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Start from the settings in this file (a run's config.json), here or in a store, instead of a preset."""


Given = TypeVar("Given", bound=Command)


def read_command(arguments: Sequence[str] | None = None) -> Config:
    """The settings that a command line asks for; tyro ends the process with status 2 for flags it does not know.

    Raises:
        UserError: for a preset, config or checkpoint that cannot be read, or a flag of earlier versions.
    """
    return parse(Command, "fastpmae-train", DESCRIPTION, arguments).settings


def parse(kind: type[Given], program: str, description: str, arguments: Sequence[str] | None = None) -> Given:
    """A command line of every setting and of the flags that `kind` adds to them, read as `read_command` does."""
    words = _with_defaults(with_values(sys.argv[1:] if arguments is None else arguments))
    for word in words:
        if word.replace("_", "-") in ("--decoder-class-token", "--no-decoder-class-token"):
            raise UserError(f"{word}: every decoder keeps the class token now, as MAE's and SdAE's do; leave it out")
    refuse_old_flags(words, SETTINGS)
    base = _base(words)
    base = base.using(**numbers_on(words, ("blr", "lr")))
    if not {"-h", "--help"}.isdisjoint(words):
        base = _printable(base)
    return tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(kind),
        prog=program,
        description=description,
        args=words,
        default=kind(base),
        registry=HELP_TEXTS,
    )


def _base(words: list[str]) -> Config:
    """The settings that the flags change."""
    config, name, resume, out = (last_value(words, flag) for flag in ("--config", "--preset", "--resume", "--out"))
    if config is not None:
        if name is not None:
            raise UserError("--config and --preset both name the settings to start from: leave one out")
        with brought_here(config) as file:
            return read_config(file)
    if name is not None:
        return preset(name)
    if resume is not None:
        places = {"resume": resume, "out": out} | {
            name: last_value(words, f"--{name}") for name in ("upload", "cache") if f"--{name}" in words
        }
        path = resumed_from(PRESETS["paper"].using(**places))
        return settings_of_run(Path(resume) if path is None else path).using(steps=None)
    return PRESETS["paper"]


def settings_of_run(path: Path) -> Config:
    """The settings of a checkpoint or run folder; those of the preset `paper` where there is no run yet.

    The newest checkpoint tells, since the run goes on from there; config.json only where there is none.

    Raises:
        UserError: when the checkpoint or the config cannot be read.
    """
    folder = run_of(local_path(path))
    if path.is_file() or is_sharded(path) or (folder is None and path.name.endswith(".safetensors")):
        return settings_in(read_progress(path), path)
    for checkpoint in checkpoints_in(folder) if folder is not None else []:
        with contextlib.suppress(CheckpointError):  # a damaged one is reported when the run is resumed
            return settings_in(read_progress(checkpoint), checkpoint)
    config = path / "config.json"
    return read_config(config, recorded=True) if config.exists() else PRESETS["paper"]


def _printable(config: Config) -> Config:
    """Settings to be shown as the defaults, which may be those of a stranger's run."""
    shown: dict[str, Any] = {}
    for name, value in config.flat().items():
        if isinstance(value, str):
            shown[name] = printable(value)
        elif isinstance(value, list) and any(isinstance(word, str) for word in value):
            shown[name] = [printable(word) for word in value]
    return config.using(**{name: value for name, value in shown.items() if value != config.flat()[name]})


ALONE = {"--resume": "auto", "--momentum-for": "0"}
"""Flags that may stand without a value, and the value that this means."""


def _with_defaults(words: list[str]) -> list[str]:
    """The words with a value behind every flag that may stand alone."""
    spread = []
    for position, word in enumerate(words):
        spread.append(word)
        follows = words[position + 1 : position + 2]
        if word in ALONE and (not follows or follows[0].startswith("-")):
            spread.append(ALONE[word])
    return spread
