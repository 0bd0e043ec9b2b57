"""What only the extra `dense` installs: asked for when it is needed, so that every command's help works without it."""

from types import ModuleType

from fastpmae_loaders.errors import UserError


def imported(name: str, package: str) -> ModuleType:
    """A module of the extra.

    Raises:
        UserError: with the line that installs it, where it is not there.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != name.split(".")[0]:
            raise
        raise UserError(f"{package} is not installed: pip install 'fastpmae[dense]'") from None
