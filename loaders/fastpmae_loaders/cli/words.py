"""A command line's words before tyro reads them: some flags name the values that the others start from."""

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
