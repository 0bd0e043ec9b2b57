"""Errors that carry a sentence for the user instead of a traceback."""


class UserError(Exception):
    """What is wrong, where (file, sample index, flag), and what to do about it."""


class BetonError(UserError):
    """A .beton file that cannot be used as it is."""
