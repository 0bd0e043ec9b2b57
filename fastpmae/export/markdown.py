"""Words from strangers in Markdown: text that stays text, whatever is in it."""

import re

from fastpmae_loaders.printable import printable

_AS_THEY_ARE = " ,'-/()%=+."
"""Signs that are markup at most at the beginning of a line."""


def plain(words: str) -> str:
    """Words as a paragraph or a table shows them: no markup, no HTML, no link, on one line.

    Every sign that could begin one is a character reference (CommonMark 0.31, section 2.5), which makes none.
    """
    line = " ".join(printable(words.replace("\n", " ")).split())
    text = "".join(
        sign if sign.isalnum() or sign in _AS_THEY_ARE else _reference(line, at) for at, sign in enumerate(line)
    )
    # At the beginning of a line these are lists or underline what is above; www. is a link to GitHub.
    return re.sub(r"^[-+=]|^\d+(?=[).](\s|$))|(?i:(?<=www))\.", lambda found: "".join(map(_referred, found[0])), text)


def _reference(line: str, at: int) -> str:
    # Between letters a low line is no emphasis, and names are full of them.
    inside = 0 < at < len(line) - 1 and line[at - 1].isalnum() and line[at + 1].isalnum()
    return line[at] if not line[at].isascii() or (line[at] == "_" and inside) else _referred(line[at])


def _referred(sign: str) -> str:
    return f"&#{ord(sign)};"


def code(words: str) -> str:
    """A code span that ends where it should: within it nothing else is markup."""
    line = printable(words)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{edge}{line}{edge}{fence}"
