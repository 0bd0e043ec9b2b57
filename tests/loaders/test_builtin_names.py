"""The packages in a program that has put functions of its own in the place of Python's."""

import builtins
import importlib
import subprocess
import sys

import pytest

import fastpmae
import fastpmae_loaders
from fastpmae_loaders.builtin_names import pythons_own
from tests.made import REPOSITORY

# a function within a function, as in MAE, DINO, iBOT and DINOv2: its module has no such name
REPLACES = """
import builtins, sys
def replace():
    builtin_print, builtin_abs = builtins.print, builtins.abs
    def print(*args, **kwargs):
        builtin_print("theirs:", *args, **kwargs)
    def abs(number):
        return builtin_abs(number)
    builtins.print, builtins.abs = print, abs
"""


@pytest.mark.parametrize(
    "program",
    [
        "replace()\nfrom fastpmae_loaders import PairedViews\nfrom fastpmae_loaders.adapters import MAELoader",
        "import fastpmae_loaders\nreplace()\nfrom fastpmae_loaders.adapters import MAELoader",
        "from fastpmae_loaders import Beton\nreplace()\nfrom fastpmae_loaders import draw_samples",
        "replace()\nfrom fastpmae_loaders.blockwise import IBOTMasks",
        "replace()\nfrom fastpmae_kernels import sinkhorn",
    ],
)
def test_it_is_imported_where_print_was_replaced(program):
    program = f"{REPLACES}\n{program}\nprint('numba' in sys.modules)"
    paths = [str(REPOSITORY / part) for part in ("", "kernels", "loaders")]
    program = f"import sys\nsys.path[:0] = {paths}\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "theirs: True\n", "")


def test_what_was_replaced_comes_back(monkeypatch):
    own = builtins.print

    def theirs(*args: object) -> None:
        own(*args)

    monkeypatch.setattr(builtins, "print", theirs)
    with pythons_own():
        assert builtins.print is own
    assert builtins.print is theirs


@pytest.mark.parametrize("package", [fastpmae, fastpmae_loaders])
def test_a_name_whose_module_fails_says_why(package, monkeypatch):
    """Python itself would say that the package has no such name."""

    def fails(*_: object) -> None:
        raise AttributeError("module 'util.misc' has no attribute 'print'")

    name = next(name for name in package._HOMES if name not in vars(package))
    monkeypatch.setattr(package, "import_module", fails)
    with pytest.raises(ImportError, match=rf"{name} cannot be imported: module 'util.misc' has no attribute 'print'"):
        importlib.import_module(package.__name__).__getattr__(name)


def test_both_packages_have_the_same():
    """Each is installed without the other."""
    places = ["loaders/fastpmae_loaders", "kernels/fastpmae_kernels"]
    one, other = ((REPOSITORY / place / "builtin_names.py").read_text() for place in places)
    assert one == other
