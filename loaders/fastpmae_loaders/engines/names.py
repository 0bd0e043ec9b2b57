"""The engines by name, and the one that is meant where none is named."""

from typing import Final

ENGINES: Final = ("native", "ffcv", "dali", "torch")
DEFAULT_ENGINE: Final = "native"
"""Of .beton files. It needs no library beside those of the plain installation."""
