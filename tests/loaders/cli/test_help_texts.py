"""What `--help` prints of every command."""

import re
from importlib import import_module
from itertools import pairwise

import pytest

WIDTH = 120
COMMANDS = {
    "fastpmae.train": [],
    "fastpmae.plan.plan": [],
    "fastpmae.evaluate.protocols": ["finetune"],
    "fastpmae.evaluate.features": [],
    "fastpmae.export.export": [],
    "fastpmae.pictures.report": [],
    "fastpmae.pictures.view": [],
    "fastpmae.demo.demo": [],
    "fastpmae_loaders.write.cli": [],
    "fastpmae_kernels.certify": [],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_help_text_is_one_paragraph(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of it ends where the terminal does, whatever lines it has in the source."""
    monkeypatch.setattr("sys.argv", [module, *COMMANDS[module], "--help"])
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    try:
        status = import_module(module).main()
    except SystemExit as ended:
        status = ended.code
    assert not status
    lines = [line.strip("│").rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(re.match(" +-h, --help ", line) for line in lines)
    for above, line in pairwise(lines):
        if re.match(r" {16,}\S", line) and re.match(r" {16,}\S", above):  # both in the column of the help texts
            assert len(above) + len(line.split()[0]) >= WIDTH - 4, f"{line!r} begins before the line above is full"
