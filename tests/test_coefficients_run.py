"""A file of coefficients in the place of its JPEGs, from training to the report: the same numbers."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from fastpmae import Config, pretrain
from fastpmae.evaluate import features, protocols
from fastpmae.pictures import report, view
from fastpmae_loaders.write.write import write_beton
from tests.made import made_image, write_tree


def run(main, words: list[object], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    said = io.StringIO()
    with redirect_stdout(said):
        assert main() == 0
    return said.getvalue()


@pytest.mark.slow
def test_everything_reads_coefficients(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "photos", 20)
    made_image(99, 70, 50).save(tree / "class_1" / "progressive.jpg", progressive=True)
    files = {mode: tmp_path / f"{mode}.beton" for mode in ("jpg", "coefficients")}
    losses, vectors = [], []
    for mode, file in files.items():
        write_beton(tree, file, workers=1, mode=mode)
        folder = pretrain(tiny.using(beton=file, out=tmp_path / f"run-{mode}", epochs=1, batch_size=4))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        run(features.main, [folder, file, tmp_path / f"{mode}.npz"], monkeypatch)
        vectors.append(np.load(tmp_path / f"{mode}.npz")["features"])
    assert losses[0] == losses[1]
    assert np.array_equal(*vectors)
    folder = tmp_path / "run-coefficients"
    run(protocols.main, ["knn", folder, "--train", files["coefficients"], "--val", files["jpg"]], monkeypatch)
    run(view.main, [files["coefficients"], tmp_path / "views.png", "--samples", 2], monkeypatch)
    run(view.main, [files["coefficients"], tmp_path / "learnt.png", "--samples", 2, "--run", folder], monkeypatch)
    run(report.main, [folder], monkeypatch)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("views.png", "learnt.png"))
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_a_damaged_image_is_named_and_passed_over(tmp_path: Path) -> None:
    """As one of a JPEG is: the next one stands in, and the check lists it."""
    file = tmp_path / "coded.beton"
    write_beton(write_tree(tmp_path / "photos", 6), file, workers=1, mode="coefficients")
    data = bytearray(file.read_bytes())
    # the fourth code: its first row of blocks would begin far behind its end
    at = -1
    for _ in range(4):
        at = data.index(b"FPC\x01", at + 1)
    index = at + 20 + 64 * data[at + 16]
    data[index : index + 4] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    words = [sys.executable, "-m", "fastpmae_loaders.write.cli", "--check", str(file), "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "bad: sample 3: the index of its rows of blocks is damaged: row 0 would be bytes" in done.stdout + done.stderr
    )
    assert "1 of 6 samples are bad" in done.stderr
