"""A stranger's words made safe to print: names of files, tensors, settings and classes."""


def printable(text: str | bytes) -> str:
    """A path or name on one line, in characters that any terminal takes: what is none of those is written as an escape.

    Bytes are taken for UTF-8; a byte that is none of it stands as `\\xff`, and so does what Python made of it in a
    file's name (`\\udcff`).
    """
    known = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
    told = known.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in told)


def printable_lines(text: str) -> str:
    """The same of a text of several lines, which stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def on_one_line(text: str, longest: int = 2000) -> str:
    """A library's words, which may hold a stranger's, printable and on one line; of long ones the first `longest`."""
    return printable(" ".join(text[:longest].split()))


def short(text: str | bytes, longest: int = 120) -> str:
    """The same, and of a longer name its beginning alone: a tensor may be called by a megabyte."""
    shown = printable(text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
