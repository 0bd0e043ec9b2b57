"""Errors that carry a sentence for the user instead of a traceback."""

from .printable import printable_lines


class UserError(Exception):
    """What is wrong, where (file, sample index, flag), and what to do about it.

    Its words may hold names out of strangers' files; as text they are what any terminal takes.
    """

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class BetonError(UserError):
    """A .beton file that cannot be used as it is."""
