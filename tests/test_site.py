"""The site of the documentation builds without a warning, and its API pages name what the packages offer."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("docs", "scripts", "site")
"""What a test may write to; the rest of the checkout is linked."""
PACKAGES = {
    "fastpmae": "fastpmae",
    "fastpmae_loaders": "loaders/fastpmae_loaders",
    "fastpmae_loaders.adapters": "loaders/fastpmae_loaders/adapters",
    "fastpmae_kernels": "kernels/fastpmae_kernels",
}
ELSEWHERE = {"fastpmae": {"UserError", "RunError", "write_beton", "write_set", "finish_set"}}
"""What another package's page describes."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for path in ROOT.iterdir():
        if path.name not in OURS and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"the extra `docs` is not installed: {missing[0]}")
    # whoever asks the network gets nothing
    closed = {"PATH": "/usr/bin:/bin", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=folder,
        env={**closed, "NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(checkout):
    done = build(checkout, REPOSITORY_URL="https://example.org/fastpmae")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    first = (checkout / "site/index.html").read_text()
    assert 'href="commands.html' in first
    assert 'src="views.png"' in first
    assert "<math" in (checkout / "site/method.html").read_text()
    assert "https://example.org/fastpmae/blob/main/fastpmae/train.py" in (checkout / "site/map.html").read_text()
    signature = (checkout / "site/api/fastpmae_loaders.html").read_text()
    assert "PairedViews" in signature
    assert "set_epoch" in signature


@pytest.mark.slow
@pytest.mark.parametrize("link", ["commands.md#no-such-heading", "no_such_page.md", "../fastpmae/no_such_file.py"])
def test_a_link_that_leads_nowhere_fails_the_build(checkout, link):
    page = checkout / "docs/method.md"
    page.write_text(page.read_text() + f"\n[somewhere]({link})\n")
    done = build(checkout)
    assert done.returncode != 0
    assert link.rpartition("/")[2].partition("#")[0] in done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_api_pages_name_everything_that_is_public(package):
    page = (ROOT / f"docs/api/{package.partition('.')[0]}.md").read_text()
    directives = re.findall(r"^::: ([\w.]+)", page, flags=re.MULTILINE)
    named = {directive.rpartition(".")[2] for directive in directives}
    for directive in directives:  # a module stands for all that it defines
        if (path := module_file(directive)) is not None:
            named |= set(re.findall(r"^(?:class |def )?(\w+)(?=[(:]| =)", path.read_text(), flags=re.MULTILINE))
    assert public(ROOT / PACKAGES[package] / "__init__.py") - ELSEWHERE.get(package, set()) <= named


def public(path: Path) -> set[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def module_file(dotted: str) -> Path | None:
    """The file of a module, or None where the name is that of something within one."""
    for home in (ROOT, ROOT / "kernels", ROOT / "loaders"):
        path = home / (dotted.replace(".", "/") + ".py")
        if path.exists():
            return path
    return None
