"""What the distributions contain and need, and that the README speaks of what there is."""

import ast
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.made import write_tree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastpmae": "fastpmae", "fastpmae_kernels": "kernels", "fastpmae_loaders": "loaders"}
# distributions whose import has another name
IMPORTED_AS = {
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "nvidia-dali-cuda130": "nvidia",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def home(package: str) -> Path:
    return ROOT / "fastpmae" if package == "fastpmae" else ROOT / PACKAGES[package] / package


def modules(package: str) -> set[str]:
    return {f"{package}/{path.relative_to(home(package))}" for path in home(package).rglob("*.py")}


def checkout(folder: Path) -> Path:
    """A copy of what a clone holds."""
    for name in ("fastpmae", "kernels", "loaders", "benchmarks", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, kind: str, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = into.iterdir()
    return built


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_and_sdist_hold_the_three_packages_and_no_kernels_or_loaders(tmp_path):
    source = checkout(tmp_path / "source")
    wheel = names_in_wheel(build(source, "wheel", tmp_path / "wheel"))
    assert {name.split("/")[0] for name in wheel} == {*PACKAGES, f"fastpmae-{PROJECT['version']}.dist-info"}
    assert f"fastpmae-{PROJECT['version']}.dist-info/licenses/LICENSE" in wheel
    for package in PACKAGES:
        assert modules(package) <= wheel
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in_wheel(build(unpacked, "wheel", tmp_path / "again")) == wheel


def test_the_loaders_alone_are_a_distribution_that_writes_what_it_reads(tmp_path):
    source = checkout(tmp_path / "source") / "loaders"
    built = build(source, "wheel", tmp_path / "wheel")
    wheel = names_in_wheel(built)
    information = f"fastpmae_loaders-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {"fastpmae_loaders", information}
    assert modules("fastpmae_loaders") <= wheel
    assert f"{information}/licenses/LICENSE" in wheel
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in_wheel(build(unpacked, "wheel", tmp_path / "again")) == wheel
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "alone")
    written = {name for name in wheel if name.startswith("fastpmae_loaders/writer/")}
    assert "fastpmae_loaders/writer/write.py" in written
    assert "fastpmae_loaders/writer/train.py" not in written  # which a docstring of a carried module names
    requirements = tomllib.loads((ROOT / "loaders/pyproject.toml").read_text())["project"]
    known = declared(requirements["dependencies"] + requirements["optional-dependencies"]["hf"])
    found = imports_of([tmp_path / "alone" / name for name in written]) - {"fastpmae_loaders"}
    assert found <= known
    program = """
import sys
from fastpmae_loaders import Beton
from fastpmae_loaders.writer.write import main
try:
    sys.argv[1:] = [sys.argv[1], "images.beton", "--workers", "1"]
    main()
finally:
    assert not {"fastpmae", "ffcv", "timm", "torch"} & set(sys.modules)
    print(len(Beton("images.beton")), "samples")
"""
    tree = write_tree(tmp_path / "tree", 9)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tree)], cwd=tmp_path, timeout=300, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path / "alone"), "HOME": str(Path.home()), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "9 samples"


def test_loaders_that_are_cut_off_from_the_writer_are_not_built(tmp_path):
    source = shutil.copytree(ROOT / "loaders", tmp_path / "loaders", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "build in a whole checkout" in done.stderr


def test_every_wheel_holds_the_licence_and_every_package_its_version():
    assert (ROOT / "loaders/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for package in PACKAGES:
        assert importlib.import_module(package).__version__ == PROJECT["version"]


def third_party_imports(package: str) -> set[str]:
    return imports_of(home(package).rglob("*.py")) - {package}


def imports_of(paths: Iterable[Path]) -> set[str]:
    found = set()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # what only a type checker imports is not needed
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def test_every_import_is_a_declared_requirement():
    extras = PROJECT["optional-dependencies"]
    optional = [line for extra in ("hf", "xformers", "dali-cuda130") for line in extras[extra]]
    # Triton comes with torch, llvmlite with numba; wandb is used where it happens to be installed
    known = declared(PROJECT["dependencies"] + optional) | {*PACKAGES, "triton", "llvmlite", "wandb"}
    for package in PACKAGES:
        assert third_party_imports(package) <= known
    loaders = tomllib.loads((ROOT / "loaders/pyproject.toml").read_text())["project"]
    optional = loaders["optional-dependencies"]
    known = declared(loaders["dependencies"] + optional["ffcv"] + optional["dali-cuda130"]) | {"llvmlite"}
    assert third_party_imports("fastpmae_loaders") <= known
    assert loaders["version"] == PROJECT["version"]


def test_the_loaders_need_neither_the_trainer_nor_triton_nor_ffcv():
    program = """
import sys
import fastpmae_loaders
from fastpmae_loaders import Beton, PairedViews, PlainViews, ViewSettings
unwanted = {"fastpmae", "fastpmae_kernels", "xformers", "ffcv", "nvidia.dali", "cv2", "timm"} & set(sys.modules)
assert not unwanted, unwanted
# torch itself may look for Triton, but nothing here imports it
assert "triton" not in sys.modules or "triton" in before, "triton"
"""
    program = "import sys, torch\nbefore = set(sys.modules)\n" + program
    environment = {"PYTHONPATH": str(ROOT / "loaders"), "PATH": "", "HOME": str(Path.home())}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_exists(command):
    module, function = PROJECT["scripts"][command].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_ci_runs_make_test():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == "exec make test"


FLAG = r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs/commands.md").read_text()
MAP = (ROOT / "docs/map.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


SUBCOMMANDS = """
import contextlib
from fastpmae.evaluate.cli import read_command
for name in ("knn", "linear", "lowshot", "probe", "finetune"):
    with contextlib.suppress(SystemExit):
        read_command([name, "--help"])
"""


def flags_of(command: str) -> set[str]:
    """The flags that a command's --help names, or those of all its subcommands."""
    module = PROJECT["scripts"][command].split(":")[0]
    words = ["-c", SUBCOMMANDS] if command == "fastpmae-eval" else ["-m", module, "--help"]
    run = subprocess.run(
        [sys.executable, *words],
        text=True,
        capture_output=True,
        timeout=300,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'loaders'}", "COLUMNS": "200", "HOME": str(Path.home())},
    )
    assert run.returncode == 0, run.stderr
    return set(re.findall(FLAG, run.stdout)) - {"--help"}


def section_of(command: str) -> str:
    """The part of docs/commands.md under the heading that starts with a command's name."""
    parts = re.split(r"^#+ ", COMMANDS, flags=re.MULTILINE)
    (section,) = [part for part in parts if part.startswith(f"`{command}")]
    return section


@pytest.mark.slow
@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_the_page_of_commands_names_every_flag_and_no_other(command):
    section = "\n".join(line for line in section_of(command).splitlines() if "SBATCH" not in line)
    named = set(re.findall(FLAG, re.sub("--nproc-per-node|--logdir", "", section)))
    flags = flags_of(command)
    if command == "fastpmae-plan":  # which takes the trainer's as well
        shared = flags_of("fastpmae-train")
        flags, named = flags - shared, named - shared
    assert named <= flags
    assert {flag for flag in flags if not flag.startswith("--no-")} <= named


def test_generated_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("doc_tables", ROOT / "scripts/doc_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page, text in tables.rewritten().items():
        assert page.read_text() == text, f"{page.name}: run .venv/bin/python scripts/doc_tables.py"


def test_the_map_names_every_file():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    rows = re.findall(r"^\| (`.+?`) \|", MAP, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    folders = tuple(name for name in named if name.endswith("/"))
    there = {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    assert named - set(folders) <= there
    unnamed = {name for name in there - named if not name.startswith(folders) and Path(name).name != "__init__.py"}
    assert unnamed == set()
    assert all((ROOT / folder).is_dir() for folder in folders)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_is_one_page():
    """What a reader needs first; tables of flags and files are in docs/."""
    assert len(README.splitlines()) < 260
