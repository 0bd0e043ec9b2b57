"""What a command imports before it has read its words: help, and a sentence about bad input, come at once."""

import json
import subprocess
import sys

LATER = {"timm", "torchvision", "torch._dynamo", "torch._inductor", "sklearn", "matplotlib", "ffcv"}
"""Libraries that only some runs need, and that take as long to import as torch itself."""


def test_the_trainer_reads_its_words_before_it_imports_what_only_some_runs_need() -> None:
    words = [sys.executable, "-m", "tests.programs.loaded", "fastpmae.train"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    loaded = set(json.loads(done.stdout))
    assert "fastpmae.pretraining.step" in loaded
    assert not loaded & LATER
