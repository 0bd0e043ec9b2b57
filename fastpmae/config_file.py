"""Settings in a file: config.json of a run, and files of settings by hand."""

import json
from pathlib import Path
from typing import Any, get_type_hints

from fastpmae.config import Config
from fastpmae.presets import preset
from fastpmae.renamed import refuse_old_settings
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short
from fastpmae_loaders.values import local_path, typed


def write_config(config: Config, path: Path) -> None:
    """Write every setting to a JSON file that `read_config` takes back."""
    path.write_text(json.dumps(config.groups(), indent=2) + "\n", encoding="utf-8")


def read_config(path: Path, *, recorded: bool = False, decoder_matters: bool = True) -> Config:
    """The settings in a file of `write_config`, or in one written by hand that names only some of them.

    Args:
        recorded, decoder_matters: see `config_from`.

    Raises:
        UserError: for a file that is not JSON, an unknown setting or a value of the wrong kind.
    """
    path = local_path(path)
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the config {path} is not JSON: {error}") from None
    return config_from(groups, str(path), recorded=recorded, decoder_matters=decoder_matters)


def config_from(groups: Any, source: str, *, recorded: bool = False, decoder_matters: bool = True) -> Config:
    """A Config from nested plain values; `source` names where they come from in the errors.

    Args:
        recorded: a run has written them, with all settings that its version had, and its preset is a name: what they
            lack was not there yet, and is off. Otherwise the preset gives what they lack.
        decoder_matters: False where it is of no interest what decoder a run had, as its encoder's use and its log are.
    """
    hints, changes = get_type_hints(Config), dict[str, Any]()
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{source} does not hold groups of settings, like {{'optimizer': {{'epochs': 100}}}}")
    refuse_old_settings(groups, source)
    preset_name = groups.get("run", {}).get("preset")
    config = preset(preset_name) if isinstance(preset_name, str) and not recorded else Config()
    for group, settings in groups.items():
        if group not in hints:
            raise UserError(f"{source} has a group {short(group)!r}; the groups are {', '.join(hints)}")
        kinds = get_type_hints(hints[group])
        for name, value in settings.items():
            if (group, name) == ("network", "decoder_class_token"):  # in what earlier versions wrote
                if value is not True and decoder_matters:
                    raise UserError(
                        f"{source} asks for a decoder without the class token (network.decoder_class_token), which "
                        "there is no more, since MAE's and SdAE's keep it: leave that out of a config; a run that "
                        "was trained so cannot be continued, but its encoder can be evaluated, exported and named "
                        "with --init"
                    )
                continue
            if name not in kinds:
                raise UserError(f"{source} has a setting {group}.{short(name)}, which does not exist")
            changes[name] = typed(value, kinds[name], f"{group}.{name} in {source}", strict=True)
    if changes.get("blr") is not None and changes.get("lr") is not None:
        raise UserError(f"{source} sets optimizer.blr and optimizer.lr: leave one out, or make it null")
    return config.using(**changes)
