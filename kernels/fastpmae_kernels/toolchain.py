"""What Triton takes from the system before it can start a kernel on a GPU: a C compiler, and Python's headers.

It builds a small program around each kernel when that is first launched. A system for running programs has neither.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def missing_tools() -> str:
    """What is missing of it here, in words; empty where nothing is, or where there is no Triton to miss it.

    It is looked for where Triton looks (its `runtime/build.py`): CC, gcc, clang; the interpreter's own include folder.
    """
    if os.name != "posix" or importlib.util.find_spec("triton") is None:
        return ""
    missing = []
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler is not None else ["gcc", "clang"])):
        missing.append("a C compiler")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    folders = [sysconfig.get_path("include", scheme)]
    for name in ("CPATH", "C_INCLUDE_PATH"):
        folders += os.environ.get(name, "").split(os.pathsep)
    if not any((Path(folder) / "Python.h").is_file() for folder in folders if folder):
        missing.append("Python's headers (Python.h)")
    return " and ".join(missing)
