"""What MkDocs needs to build the site from pages that GitHub shows as well: pages outside docs/, links, equations."""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "loaders.md": "loaders/README.md",
    "kernels.md": "kernels/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site that are not in docs/, with the file of the repository that each is."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """```math fences, which GitHub shows as equations, become MathML: browsers draw it without a script."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the repository has them, turned to where the site has the same page or picture."""
    source = source_of(page.file.src_uri)
    there = {source_of(file.src_uri): file.src_uri for file in files}

    def moved(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in there:
            path = posixpath.relpath(there[path], posixpath.dirname(page.file.src_uri) or ".")
        elif not (ROOT / path).exists():
            return found[0]  # MkDocs reports it
        elif config.repo_url:
            path = f"{config.repo_url.rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        else:
            return text
        return f"{picture}[{text}]({path}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def source_of(page: str) -> str:
    """The file of the repository that a page or picture of the site comes from."""
    return ELSEWHERE.get(page, f"docs/{page}")


def equation(source: str, language: str, css_class: str, *_: Any, **__: Any) -> str:
    """An equation in LaTeX as a block of MathML."""
    alternative = html.escape(source, quote=True)
    return f'<div class="{css_class}" aria-label="{alternative}">{convert(source, display="block")}</div>'
