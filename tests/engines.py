"""What tests of engine "ffcv" and of stock FFCV stand under: they are skipped where it is not installed."""

import pytest

from fastpmae_loaders.sources.jpeg import turbo_available

needs_ffcv = pytest.mark.skipif(not turbo_available(), reason="ffcv is not installed (make setup FFCV=1)")
FFCV = pytest.param("ffcv", marks=needs_ffcv)
