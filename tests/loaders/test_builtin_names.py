"""The packages in a program that has put functions of its own in the place of Python's."""

import builtins
import importlib
import os
import subprocess
import sys

import pytest

import fastpmae
import fastpmae_loaders
from fastpmae_loaders.builtin_names import pythons_own
from tests.made import REPOSITORY
from tests.programs.print_replaced import CASES


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_imported_where_print_was_replaced(case: str):
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.print_replaced", case],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
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
