"""What the distributions contain and need, and that the README speaks of what there is."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from fastpmae import pretrain
from tests.made import COMMANDS_AT, HOMES, PROJECTS, REPOSITORY, tiny_settings, write_tree

ROOT = REPOSITORY
PROGRAMS = ROOT / "tests/programs"
LOADED = str(PROGRAMS / "loaded.py")
# distributions whose import has another name
IMPORTED_AS = {
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "nvidia-dali-cuda130": "nvidia",
}
VERSION = importlib.import_module("fastpmae").__version__


def modules(package: str) -> set[str]:
    """The modules of a package, and the templates beside them."""
    files = (path for kind in ("*.py", "*.j2") for path in (HOMES[package] / package).rglob(kind))
    return {str(path.relative_to(HOMES[package])) for path in files}


def checkout(folder: Path) -> Path:
    """A copy of what a clone holds."""
    for name in ("fastpmae", "kernels", "loaders", "benchmarks", "tests"):
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


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, by its package."""
    source, made = checkout(tmp_path_factory.mktemp("source") / "checkout"), tmp_path_factory.mktemp("wheels")
    return {package: build(source / home.relative_to(ROOT), "wheel", made / package) for package, home in HOMES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("package", HOMES)
def test_a_wheel_holds_its_own_package_alone_and_is_built_from_its_sdist_too(package, wheels, tmp_path):
    wheel = names_in_wheel(wheels[package])
    information = f"{package}-{VERSION}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {package, information}
    assert modules(package) | {f"{package}/py.typed", f"{information}/licenses/LICENSE"} <= wheel
    source = checkout(tmp_path / "source") / HOMES[package].relative_to(ROOT)
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in_wheel(build(unpacked, "wheel", tmp_path / "again")) == wheel


def environment(folder: Path) -> Path:
    """A new virtual environment that finds what this one has besides our own distributions; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)  # this one's pip is found as well
    (site,) = folder.glob("lib/python*/site-packages")
    # a .pth in a folder that a .pth names is not followed: editable installs stay out
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def in_environment(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(Path.home()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), *words], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def pip(python: Path, *words: str, cwd: Path) -> None:
    in_environment(python, "-m", "pip", "--disable-pip-version-check", "--no-input", *words, cwd=cwd)


@pytest.mark.slow
def test_the_three_live_together_and_losing_one_leaves_the_others_whole(wheels, tmp_path):
    python = environment(tmp_path / "together")
    pip(python, "install", "--no-index", "--no-deps", *map(str, wheels.values()), cwd=tmp_path)
    in_environment(python, LOADED, "fastpmae.train", "fastpmae_kernels", "fastpmae_loaders.adapters", cwd=tmp_path)
    for command in COMMANDS_AT:
        assert (python.parent / command).exists()
    (site,) = (tmp_path / "together").glob("lib/python*/site-packages")
    for lost in ("fastpmae", "fastpmae_loaders"):
        pip(python, "uninstall", "-y", lost.replace("_", "-"), cwd=tmp_path)
        assert not (site / lost).exists()
        left = [package for package in HOMES if (site / package).exists()]
        for package in left:
            assert {name for name in names_in_wheel(wheels[package]) if not (site / name).exists()} == set()
            there = {name for name, place in COMMANDS_AT.items() if place.startswith(f"{package}.")}
            assert all((python.parent / name).exists() for name in there)
    in_environment(python, LOADED, "fastpmae_kernels", cwd=tmp_path)


@pytest.mark.slow
def test_the_loaders_alone_write_what_they_read(wheels, tmp_path):
    python = environment(tmp_path / "alone")
    pip(python, "install", "--no-index", "--no-deps", str(wheels["fastpmae_loaders"]), cwd=tmp_path)
    tree = write_tree(tmp_path / "tree", 9)
    in_environment(
        python, str(python.parent / "fastpmae-write"), str(tree), "images.beton", "--workers", "1", cwd=tmp_path
    )
    program = str(PROGRAMS / "installed_loaders.py")
    assert in_environment(python, program, "images.beton", cwd=tmp_path).stdout == f"9 {VERSION}\n"


@pytest.mark.slow
def test_the_kernels_alone_compute(wheels, tmp_path):
    python = environment(tmp_path / "alone")
    pip(python, "install", "--no-index", "--no-deps", str(wheels["fastpmae_kernels"]), cwd=tmp_path)
    program = str(PROGRAMS / "installed_kernels.py")
    assert in_environment(python, program, cwd=tmp_path).stdout == f"{VERSION} [0.5, 0.5]\n"


def loaded_by(*imports: str) -> list[set[str]]:
    """The modules that each of some imports brings where there are the loaders alone."""
    environment = {"PYTHONPATH": str(ROOT / "loaders"), "PATH": "", "HOME": str(Path.home())}
    words = [sys.executable, LOADED, *imports]
    done = subprocess.run(words, check=True, env=environment, capture_output=True, text=True, timeout=120)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_release_is_six_files_that_twine_finds_sound(tmp_path):
    done = subprocess.run(
        [str(ROOT / "scripts/release"), "build", str(tmp_path / "dist")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ("-py3-none-any.whl", ".tar.gz")
    expected = {f"{package}-{VERSION}{kind}" for package in HOMES for kind in kinds}
    assert {path.name for path in (tmp_path / "dist").iterdir()} == expected
    assert done.stdout.count("PASSED") == 6
    again = subprocess.run([str(ROOT / "scripts/release"), "build", str(tmp_path / "dist")], capture_output=True)
    assert again.returncode == 1
    assert b"is not empty" in again.stderr


NO_SCIKITS = """
import sys
sys.modules.update(sklearn=None, skimage=None)  # an import of either fails
from fastpmae.evaluate.protocols import main
beton, folder, *kinds = sys.argv[1:]
for kind, *more in map(str.split, kinds):
    sys.argv[1:] = [kind, f"{folder}/run", "--train", beton, "--val", beton, "--out", f"{folder}/{kind}", *more]
    assert main() == 0, kind
"""


@pytest.mark.slow
def test_knn_and_probes_need_neither_scikit_learn_nor_scikit_image(small_beton, tmp_path):
    pretrain(tiny_settings(small_beton).using(out=tmp_path / "run", steps=1))
    kinds = [
        "knn --k 5",
        "linear --epochs 1",
        "lowshot --shares 0.5 --draws 1",
        "probe --epochs 1 --warmup-epochs 0",
    ]
    subprocess.run(
        [sys.executable, "-c", NO_SCIKITS, str(small_beton), str(tmp_path), *kinds],
        check=True, timeout=300, env={"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(Path.home())},
    )  # fmt: skip
    assert (tmp_path / "probe").is_dir()


def test_the_writer_needs_neither_torch_nor_numba_nor_ffcv():
    (loaded,) = loaded_by("fastpmae_loaders.write.cli")
    assert {"fastpmae", "fastpmae_kernels", "ffcv", "numba", "timm", "torch"} & loaded == set()


def test_one_version_and_one_licence():
    for package, home in HOMES.items():
        assert (home / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
        assert PROJECTS[package]["dynamic"] == ["version"]
        assert PROJECTS[package]["urls"] == PROJECTS["fastpmae"]["urls"]
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    series = VERSION.rpartition(".")[0]
    needed = [line for line in PROJECTS["fastpmae"]["dependencies"] if line.startswith("fastpmae-")]
    assert sorted(needed) == [f"fastpmae-kernels=={series}.*", f"fastpmae-loaders=={series}.*"]


def third_party_imports(package: str) -> set[str]:
    return imports_of((HOMES[package] / package).rglob("*.py")) - {package}


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


# Triton comes with torch, llvmlite with numba, markupsafe with jinja2; wandb is used where it happens to be installed
COMES_ALONG = {"triton", "llvmlite", "markupsafe", "wandb"}
EXTRAS = ("ffcv", "hf", "heif", "ray", "stores", "xformers", "dali-cuda130", "demo", "dense", "certify")


@pytest.mark.parametrize("package", HOMES)
def test_every_import_is_a_declared_requirement(package):
    project = PROJECTS[package]
    extras = project.get("optional-dependencies", {})
    optional = [line for extra in EXTRAS for line in extras.get(extra, [])]
    assert third_party_imports(package) <= declared(project["dependencies"] + optional) | COMES_ALONG


@pytest.mark.slow
def test_the_loaders_need_neither_the_trainer_nor_triton_nor_ffcv():
    # torch itself may look for Triton, but nothing here imports it
    first, then = loaded_by("torch", "fastpmae_loaders:Beton,PairedViews,PlainViews,ViewSettings")
    assert "fastpmae_loaders.paired" in then
    unwanted = {"fastpmae", "fastpmae_kernels", "xformers", "ffcv", "nvidia.dali", "cv2", "timm"}
    assert unwanted & (first | then) == set()
    assert "triton" not in then


@pytest.mark.parametrize("command", COMMANDS_AT)
def test_every_command_exists(command):
    module, function = COMMANDS_AT[command].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_types_are_checked_alike_with_and_without_ffcv():
    """What imports it says that it may be missing, or `make check` would fail where it is not installed."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if "ffcv" in imports_of([ROOT / name]):
            assert "\n# pyright: reportMissingImports=false" in (ROOT / name).read_text(), name


def test_ci_runs_make_test():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == "exec make test"


def test_workflows_and_templates_are_sound():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        flow = yaml.safe_load(path.read_text())
        assert flow["permissions"] == {"contents": "read"}, path
        for job in flow["jobs"].values():
            assert job["timeout-minutes"] <= 120
            assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[bi]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert all(
        (ROOT / word).exists() for hook in hooks for word in hook["entry"].split() if word.startswith("scripts/")
    )


def test_every_make_target_that_is_named_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / ".github").rglob("*.*")]
    for page in pages:
        text = page.read_text()
        named = re.findall(r"(?:^|`|run: )make ([a-z]+)", text, flags=re.MULTILINE)
        assert set(named) <= targets, page


FLAG = r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs/commands.md").read_text()
MAP = (ROOT / "docs/map.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name / "README.md" for name in ("kernels", "loaders", "benchmarks")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags that each command's --help names, or those of all its subcommands; one process imports them all."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.programs.helps"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'loaders'}", "COLUMNS": "200", "HOME": str(Path.home())},
    )
    assert run.returncode == 0, run.stderr
    return {name: set(re.findall(FLAG, text)) - {"--help"} for name, text in json.loads(run.stdout).items()}


def section_of(command: str) -> str:
    """The part of docs/commands.md under the heading that starts with a command's name."""
    parts = re.split(r"^#+ ", COMMANDS, flags=re.MULTILINE)
    (section,) = [part for part in parts if part.startswith(f"`{command}")]
    return section


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS_AT)
def test_the_page_of_commands_names_every_flag_and_no_other(command, flags):
    section = "\n".join(line for line in section_of(command).splitlines() if "SBATCH" not in line)
    named = set(re.findall(FLAG, re.sub("--nproc-per-node|--logdir", "", section)))
    there = flags[command]
    if command == "fastpmae-plan":  # which takes the trainer's as well
        there, named = there - flags["fastpmae-train"], named - flags["fastpmae-train"]
    assert len(there) > 3
    assert named <= there
    assert {flag for flag in there if not flag.startswith("--no-")} <= named


def test_generated_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("doc_tables", ROOT / "scripts/doc_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page, text in tables.rewritten().items():
        assert page.read_text() == text, f"{page.name}: run .venv/bin/python scripts/doc_tables.py"


def test_help_texts_stand_alone():
    """In a terminal a flag's text is read without the one above it."""
    rows = re.findall(
        r"^\| `--([a-z-]+)` \| [^|]* \| (?:(?:`[^`]+`, )*`[^`]+`\. )?(.+) \|$", COMMANDS, flags=re.MULTILINE
    )
    assert len(rows) > 150
    leaning = re.compile(r"(Its?|Their|They|Them|This|These|Not|Of|On|In|And|Also|Or|The same|Divides)\b|How:")
    assert [(flag, text) for flag, text in rows if leaning.match(text)] == []


def test_the_map_names_every_file():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    rows = re.findall(r"^\| (`.+?`) \|", MAP.partition("## Every file")[2], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    folders = tuple(name for name in named if name.endswith("/"))
    there = {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    assert named - set(folders) <= there
    unnamed = {name for name in there - named if not name.startswith(folders) and Path(name).name != "__init__.py"}
    assert unnamed == set()
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_map_says_what_to_open_and_which_tests_to_run():
    tables = MAP.partition("## To change something")[2].partition("## Every file")[0]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .+", tables, flags=re.MULTILINE)]
    rows = [row for row in rows if row[0] not in ("to change", "---")]
    assert len(rows) > 40
    for _, opened, run in rows:
        assert all((ROOT / path).exists() for path in re.findall(r"\[`([^`]+)`\]", opened)), opened
        tests = re.findall(r"`(tests/[^`]+)`", run)
        assert tests
        assert all((ROOT / path).exists() for path in tests), run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_is_one_page():
    """What a reader needs first; tables of flags and files are in docs/."""
    assert len(README.splitlines()) <= 120
