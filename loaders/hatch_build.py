"""What writes .beton files is a part of fastpmae; a distribution of the loaders alone carries it along.

`fastpmae/write.py`, and what it imports of fastpmae, becomes `fastpmae_loaders/writer`. In a checkout it stays where it
is; a wheel that is built from the loaders' own sdist finds it there already.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = re.compile(r'(^\s*from |")fastpmae\.(\w+)(?= import |:)', re.MULTILINE)
"""A module where it is imported, and in the names by which worker processes import: what a comment names is no part."""


def writer(trainer: Path) -> dict[str, str]:
    """The text of each file of `fastpmae_loaders/writer`, from the folder of the package fastpmae."""
    texts = {"__init__.py": '"""Images into .beton files: the writer of fastpmae."""\n'}
    wanted = ["write"]
    while wanted:
        module = wanted.pop()
        if f"{module}.py" in texts or not (trainer / f"{module}.py").is_file():
            continue
        text = (trainer / f"{module}.py").read_text()
        wanted += [name for _, name in NAME.findall(text)]
        texts[f"{module}.py"] = NAME.sub(r"\1fastpmae_loaders.writer.\2", text)
    return texts


class CarryTheWriter(BuildHookInterface):
    """Adds the writer to wheels and sdists."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build. Raises FileNotFoundError where the writer is nowhere."""
        root = Path(self.root)
        trainer = root.parent / "fastpmae"
        if (root / "fastpmae_loaders" / "writer" / "write.py").is_file():
            return
        if not (trainer / "write.py").is_file():
            raise FileNotFoundError(f"{trainer} holds no write.py: build in a whole checkout, or from an sdist")
        self._folder = tempfile.TemporaryDirectory()
        for name, text in writer(trainer).items():
            (Path(self._folder.name) / name).write_text(text)
            build_data["force_include"][str(Path(self._folder.name) / name)] = f"fastpmae_loaders/writer/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called after a build."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
