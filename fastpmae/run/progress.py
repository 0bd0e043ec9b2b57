"""How far a run was, as a checkpoint holds it beside the tensors: plain JSON values, which may be a stranger's."""

import json
from pathlib import Path
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line

PROGRESS = {"step": int, "steps_per_epoch": int, "bad_images": int, "fingerprint": str, "config": dict}
"""What every checkpoint's progress holds."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file."""


def parsed_progress(told: str, path: Path) -> dict[str, Any]:
    """A checkpoint's progress, with the kinds of values that a run relies on.

    Raises:
        CheckpointError: where it has others, or is no JSON.
    """
    try:
        progress = json.loads(told)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {on_one_line(str(error))}") from None
    for name, kind in PROGRESS.items():
        value = progress.get(name) if isinstance(progress, dict) else None
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
            raise CheckpointError(f"{path} is damaged: its progress holds no sound {name!r}")
    return progress
