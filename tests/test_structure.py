"""The house: packages import downwards, nothing in a circle, and no name that hides a public function."""

import ast
from pathlib import Path

import pytest

import fastpmae
import fastpmae_loaders

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"fastpmae": ROOT, "fastpmae_kernels": ROOT / "kernels", "fastpmae_loaders": ROOT / "loaders"}
DISTRIBUTIONS = ("fastpmae_loaders", "fastpmae_kernels", "fastpmae")
ROOMS = {
    "fastpmae": (
        [
            "weights",
            "renamed",
            "settings",
            "config",
            "presets",
            "config_file",
            "plotting",
            "photographs",
            "templating",
            "distributed",
            "model",
            "run",
            "evaluate",
            "pretraining",
            "plan",
            "export",
            "train",
            "pictures",
            "demo",
        ]
    ),
    "fastpmae_kernels": [
        "backend",
        "builtin_names",
        "locks",
        "toolchain",
        "photometric_numbers",
        "cpu",
        "long_rows",
        "traffic",
        "match",
        "patch_tokens",
        "photometric",
        "photometric_gpu",
        "sinkhorn",
        "prototype_loss",
        "prototype_features",
        "builds",
        "certify",
    ],
    "fastpmae_loaders": [
        "builtin_names",
        "printable",
        "errors",
        "values",
        "locks",
        "machine",
        "cli",
        "files",
        "stores",
        "jit",
        "native",
        "sources",
        "recipes",
        "settings",
        "sampling",
        "order",
        "blockwise",
        "multiblock",
        "pixels",
        "engines",
        "batch",
        "transfer",
        "mixture",
        "folders",
        "position",
        "bad_samples",
        "paired",
        "plain",
        "ffcv",
        "adapters",
        "timm_recipe",
        "write",
    ],
}
"""From the ground up: a room imports from those before it alone. In the kernels one file is one operation."""


def module_of(path: Path, package: str) -> str:
    words = path.relative_to(HOMES[package]).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def modules() -> dict[str, ast.Module]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package, home in HOMES.items():
        for path in sorted((home / package).rglob("*.py")):
            found[module_of(path, package)] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """The modules of ours that a module imports, at whatever depth, for a type checker too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {other for other in found if other in known} - {name}


TREES = modules()
GRAPH = {name: imports(name, tree, TREES) for name, tree in TREES.items()}


def room_of(module: str) -> tuple[str, str]:
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a node back to itself; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*way, node]):
                return found
        done.add(node)
        return []

    for node in sorted(graph):
        if found := walk(node, []):
            return found
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {other for other in others if other not in HOMES} for name, others in GRAPH.items()}
    assert circle({name: others for name, others in graph.items() if name not in HOMES}) == []


@pytest.mark.parametrize("package", HOMES)
def test_packages_import_downwards(package):
    order = ROOMS[package]
    there = {room for home, room in map(room_of, TREES) if home == package and room}
    assert set(order) == there
    upwards = [
        (module, other)
        for module, others in GRAPH.items()
        for other in others
        if room_of(module)[0] == room_of(other)[0] == package and room_of(module)[1] and room_of(other)[1]
        if order.index(room_of(other)[1]) > order.index(room_of(module)[1])
    ]
    assert upwards == []


def test_every_import_is_by_its_whole_name():
    """What is looked at here sees no other."""
    relative = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def test_distributions_import_downwards():
    """And the loaders and the kernels nothing of each other."""
    for module, others in GRAPH.items():
        mine = room_of(module)[0]
        allowed = {mine} | (set(DISTRIBUTIONS) if mine == "fastpmae" else set())
        assert {room_of(other)[0] for other in others} <= allowed, module


TWINS = {"builtin_names": "builtin_names", "locks": "locks", "cpu/cache": "jit/cache"}
"""Modules that the kernels and the loaders both need, and that neither may import from the other."""


@pytest.mark.parametrize("name", TWINS)
def test_what_both_distributions_need_is_the_same_in_both(name):
    kernels = (HOMES["fastpmae_kernels"] / f"fastpmae_kernels/{name}.py").read_text()
    loaders = (HOMES["fastpmae_loaders"] / f"fastpmae_loaders/{TWINS[name]}.py").read_text()
    assert kernels.replace("fastpmae_kernels", "fastpmae_loaders") == loaders


def test_no_module_bears_the_name_of_a_public_function():
    """`from fastpmae import pretrain` is the function, whatever else has been imported.

    The kernels' `__init__` imports each of its modules before the function of the same name.
    """
    own = {word for module in TREES if not module.startswith("fastpmae_kernels") for word in module.split(".")[1:]}
    assert own & {*fastpmae.__all__, *fastpmae_loaders.__all__} == set()


def test_modules_are_short_and_the_ground_floor_is_small():
    lengths = {}
    for package, home in HOMES.items():
        for path in (home / package).rglob("*.py"):
            lengths[str(path.relative_to(ROOT))] = len(path.read_text().splitlines())
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    beside = [name for name in (ROOT / "fastpmae").glob("*.py") if name.name != "__init__.py"]
    assert len(beside) <= 8


LOOPS = {"fastpmae.train": "pretrain", "fastpmae.evaluate.finetune": "train_classifier"}


def depth_of(node: ast.AST) -> int:
    """How many statements with a body of their own stand within each other."""
    within = max((depth_of(child) for child in ast.iter_child_nodes(node)), default=0)
    return within + isinstance(node, ast.With | ast.For | ast.While | ast.If | ast.Try | ast.FunctionDef)


@pytest.mark.parametrize("module", LOOPS)
def test_a_training_loop_fits_one_screen(module):
    loop = next(node for node in TREES[module].body if isinstance(node, ast.FunctionDef) and node.name == LOOPS[module])
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 80
    assert depth_of(loop) - 1 <= 4
