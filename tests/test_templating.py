"""Pages from templates: what is put into one is text there, whatever is in it."""

import html
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from fastpmae.export.markdown import plain
from fastpmae.templating import html_page, text_page

EVIL = ["<script>a(1)</script>", '"><img src=x onerror=y>', "{{ 7 * 7 }}", "{% raw %}", "&lt;", "a'b", "</td></tr>"]
"""Names that would be markup, or a template's own."""


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(f"{tag} {sorted(dict(attrs))}")

    def handle_data(self, data: str) -> None:
        self.text += data


def report(word: str) -> str:
    columns = ("evaluation", "network", "step", "images_of", "detail", "top1", "top5", "figures", "images", "date")
    row = dict.fromkeys(columns, word)
    return html_page(
        "fastpmae.pictures", "report.html.j2", name=word, summary=word, figures=[(word, word)], evaluations=[row],
        dense=[row], curves=word, pictures={word: word}, remark=word, which=word,
        changed={word: word}, settings={word: word},
    )  # fmt: skip


@pytest.mark.parametrize("word", EVIL)
def test_a_report_has_the_same_tags_whatever_stands_in_it(word: str) -> None:
    found, harmless = Reader(report(word)), Reader(report("WORD"))
    assert found.tags == harmless.tags
    assert found.text == harmless.text.replace("WORD", word)


@pytest.mark.parametrize("word", EVIL)
def test_a_card_makes_text_of_everything_that_is_not_marked(word: str) -> None:
    def card(text: str) -> str:
        network = dict.fromkeys(("depth", "embed_dim", "num_heads", "patch_size", "img_size"), text)
        return text_page(
            "fastpmae.export", "model_card.md.j2", plain, library=None, task=text, name=text, network=network,
            whole=False, what=text, source=text, normalisation=text, loading=Markup("# as it is"), timm=text,
            results=[[text] * 6], dense=[[text] * 4], classes=[text, text], backbone=text, finetune=None,
            pretraining=None,
        )  # fmt: skip

    assert card(word) == card("WORD").replace("WORD", plain(word))
    assert html.unescape(plain(word)) == html.unescape(word) or word == "&lt;"
    assert "\n# as it is\n" in card(word)


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        html_page("fastpmae.pictures", "report.html.j2")
