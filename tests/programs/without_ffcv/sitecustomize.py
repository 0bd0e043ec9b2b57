"""For a program, and all processes that it starts, FFCV, OpenCV and libjpeg-turbo are not to be had.

Python imports it first of all where its folder is in PYTHONPATH. What is loaded of them all the same is told in
the file named by LOADED.
"""

import atexit
import os
import sys
from pathlib import Path

LIBRARIES = ("ffcv", "turbojpeg", "opencv")


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """A library of these is not there, whoever asks for it."""
    if event == "ctypes.dlopen" and any(name in str(arguments[0]).lower() for name in LIBRARIES):
        raise OSError(f"{arguments[0]}: cannot open shared object file: No such file or directory")


def tell() -> None:
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().lower() if maps.exists() else ""
    found = [name for name in LIBRARIES if f"lib{name}" in mapped]
    if found:
        with Path(os.environ["LOADED"]).open("a") as file:
            file.write(f"{' '.join(sys.argv)}: {', '.join(found)}\n")


# an import of them fails, and a search for them finds nothing
sys.modules.update(dict.fromkeys(("ffcv", "cv2", "turbojpeg")))  # pyright: ignore[reportArgumentType, reportCallIssue]
sys.addaudithook(refuse)
atexit.register(tell)
