"""A command line's words before tyro reads them: some flags name the values that the others start from."""

import contextlib
from collections.abc import Iterable, Sequence


def with_values(words: Iterable[str]) -> list[str]:
    """The words with every `--flag=value` as two."""
    spread = []
    for word in words:
        flag, equals, value = word.partition("=")
        spread += [flag, value] if equals and flag.startswith("--") else [word]
    return spread


def last_value(words: Sequence[str], flag: str) -> str | None:
    """The word after the last `flag`; None where there is none. `words` are as `with_values` gives them."""
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


def numbers_on(words: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """The last number after each `--name`, by its name; what is no number is left to the parser.

    A parser sets one field after the other: where one takes another's place, the settings that it starts from must
    have given the other up already. `words` are as `with_values` gives them.
    """
    found = {}
    for name in names:
        with contextlib.suppress(ValueError):
            found[name] = float(last_value(words, f"--{name}") or "none")
    return found
