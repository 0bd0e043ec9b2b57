"""Pictures with names in any script, written to the same bytes each time."""

import functools
import logging
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

# that the font which has a sign lacks the weight asked for is no news to a user
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

UNKNOWN = "□"
"""Stands for a sign that no font of this machine has."""
DATES = {"pdf": "CreationDate", "svg": "Date"}
"""Where matplotlib notes the time."""


def save_picture(figure: Figure, target: Path | IO[bytes], dpi: float, kind: str = "") -> None:
    """Write a figure. matplotlib's own font lacks most scripts: signs that it has not are taken from another one.

    Args:
        target: a file by its name's end, or an open file of the kind `kind`.
    """
    kind = kind or (Path(target).suffix.lower().removeprefix(".") if isinstance(target, Path) else "png")
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            _letter(text)
    noted: dict[str, Any] = {"metadata": {DATES[kind]: None}} if kind in DATES else {}
    # The names of an SVG's parts are drawn otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "fastpmae"}):
        figure.savefig(target, dpi=dpi, format=kind, **noted)


def drawable(words: str) -> str:
    """The words with a sign in the place of each that no font has: for ticks, whose labels are set in drawing."""
    _, missing = _looked_up(words, FontProperties())
    return "".join(UNKNOWN if sign in missing else sign for sign in words)


def _letter(text: Text) -> None:
    """Give a text the fonts that it needs, and what no font has a sign that says so."""
    words = text.get_text()
    if words.isascii():
        return
    families, missing = _looked_up(words, text.get_fontproperties())
    if families:
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if missing:
        text.set_text("".join(UNKNOWN if sign in missing else sign for sign in words))


def _looked_up(words: str, font: FontProperties) -> tuple[list[str], set[str]]:
    """The families that have what a font has not, and the signs that none has."""
    own = _signs(font_manager.findfont(font))
    missing = {sign for sign in words if sign != "\n" and ord(sign) not in own}
    families = []
    for family, path in _fonts() if missing else []:
        found = {sign for sign in missing if ord(sign) in _signs(path)}
        if found:
            families.append(family)
            missing -= found
    return families, missing


@functools.cache
def _fonts() -> list[tuple[str, str]]:
    """Each family once, with the file that matplotlib takes for it."""
    names = sorted({entry.name for entry in font_manager.fontManager.ttflist})
    # The last resort has a sign for everything, and it is not the one that is meant.
    return [(name, font_manager.findfont(FontProperties(name))) for name in names if "resort" not in name.lower()]


@functools.cache
def _signs(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that cannot be opened draws nothing
        return frozenset()
