"""What strangers call things, on a terminal."""

import os

import pytest

from fastpmae_loaders.printable import printable, short


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("Möwe 鳥 🐦", "Möwe 鳥 🐦"),
        ("\x1b]0;pwn\x07\x1b[31mred", "\\x1b]0;pwn\\x07\\x1b[31mred"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b31m", "\\x9b31m"),  # a terminal takes this one character for the beginning of a sequence too
        ("right\u202eleft", "right\\u202eleft"),
        ("\U000e0041", "\\U000e0041"),
        (b"caf\xc3\xa9", "café"),
        (b"caf\xe9\x1b", "caf\\xe9\\x1b"),
        (os.fsdecode(b"\xff.jpg"), "\\udcff.jpg"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_a_name_is_one_line_of_characters_that_a_terminal_shows(given: str | bytes, shown: str) -> None:
    found = printable(given)
    assert found == shown
    assert found.isprintable()
    found.encode("utf-8")


def test_a_long_name_is_cut():
    assert short("a" * 120) == "a" * 120
    assert short("a" * 10**7) == "a" * 119 + "…"
    assert short("\x1b" * 100) == ("\\x1b" * 30)[:119] + "…"
    assert short(b"caf\xe9") == "caf\\xe9"
