"""Words from strangers as an independent reader of Markdown sees them: the same words, and nothing else."""

import html

import pytest
from markdown_it import MarkdownIt

from fastpmae.export.markdown import code, plain

WORDS = [
    "class_0", "birds/val.beton", "42.12 %", "k = 7, class token", "T-shirt, no. 5", "東京 — été",
    "# heading", "- item", "+ item", "* item", "1. item", "1) item", "123", "===", "---", "    indented", "> quote",
    "<b>x</b>", "<!-- x", "<?php x", "&lt;", "&amp", "*a* **b** _c_ __d__", "~~s~~", "[a](b)", "![a](b)", "[a]: b",
    "`a`", "``a", "a|b", "http://a.b", "www.a.b", "WWW.a.b", "<http://a.b>", "a@b.c", "a\\*b", "$x$", "a\\", "|", "",
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_text_stays_text(words: str):
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = " ".join(words.split())
    for around in ("{}", "before\n{}", "{}\nafter", "| a |\n| --- |\n| {} |"):
        page = reader.render(around.format(plain(words)))
        expected = reader.render(around.format("XX"))
        if shown:
            assert html.unescape(page) == html.unescape(expected).replace("XX", shown)


@pytest.mark.parametrize("words", ["a", "`a`", "``", "a ``` b", "<b>", "a\nb", "\\", "a`"])
def test_code_ends_where_it_should(words: str):
    page = MarkdownIt("commonmark").render(f"x {code(words)} y")
    shown = words.replace("\n", "\\n")
    assert html.unescape(page) == f"<p>x <code>{shown}</code> y</p>\n"
