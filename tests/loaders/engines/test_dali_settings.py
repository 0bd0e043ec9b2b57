from typing import Any

import pytest

from fastpmae_loaders import DaliSettings, UserError


def test_the_default_is_the_decoder_that_every_gpu_has():
    assert DaliSettings() == DaliSettings(part=0, hw_decoder_load=0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"part": -1}, "between 1 and 4096"),
        ({"part": 5000}, "between 1 and 4096"),
        ({"hw_decoder_load": 1.5}, "between 0 and 1"),
        ({"hw_decoder_load": -0.1}, "between 0 and 1"),
        ({"hw_decoder_load": float("nan")}, "between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        DaliSettings(**settings)
