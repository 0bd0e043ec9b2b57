"""A .beton of coefficients made one of JPEGs: the same pictures, labels and order, or a sentence and no file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders import Beton, UserError
from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.native.damage import OTHER_DIGEST
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, RAW
from fastpmae_loaders.write.cli import main
from fastpmae_loaders.write.jpegs import write_jpegs
from fastpmae_loaders.write.write import BadImages, write_beton
from tests.loaders.files import made_pixels
from tests.loaders.files import write_beton as made_beton
from tests.loaders.native.jpegs import encoded
from tests.made import REPOSITORY, made_image, write_tree

SIZE = (61, 47)


def code(number: int) -> bytes:
    found = pack_jpeg(encoded(made_image(number, *SIZE), (0, 1, 2, "gray")[number % 4], 85), SIZE[1], SIZE[0])
    assert found is not None
    return found


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fastpmae-write", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the command sets its own, for good
    return main()


def test_the_same_pictures_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    tree = write_tree(tmp_path / "photos", 9)
    made_image(77, 60, 50).save(tree / "class_0" / "progressive.jpg", progressive=True)
    write_beton(tree, tmp_path / "jpg.beton", workers=1)
    write_beton(tree, tmp_path / "coded.beton", workers=1, mode="coefficients")
    assert run(["--to-jpeg", tmp_path / "coded.beton", tmp_path / "back.beton", "--workers", 1], monkeypatch) == 0
    assert "1 with their own bytes, 9 made JPEGs of coefficients" in capfd.readouterr().out
    before, back, coded = (Beton(tmp_path / f"{name}.beton") for name in ("jpg", "back", "coded"))
    assert (back.mode == JPG).all()
    assert back.class_names == before.class_names
    assert np.array_equal(back.label, before.label)
    for index in range(len(before)):
        pixels, size = back.decode(index), (int(back.height[index]), int(back.width[index]))
        assert np.array_equal(pixels, before.decode(index))
        if coded.mode[index] == COEFFICIENTS:
            assert pack_jpeg(back.payload(index).tobytes(), *size) == coded.payload(index).tobytes()
        else:
            assert back.payload(index).tobytes() == before.payload(index).tobytes()


def test_what_is_no_coefficients_keeps_its_bytes(tmp_path: Path) -> None:
    progressive = encoded(made_image(3, *SIZE), 2, 80, progressive=True)
    file = made_beton(tmp_path / "mixed.beton", [code(1), progressive, made_pixels(1, *SIZE[::-1])], 3 * [SIZE])
    written = write_jpegs(file, tmp_path / "back.beton", workers=1)
    assert (written.samples, written.kept, written.converted) == (3, 2, 1)
    back = Beton(tmp_path / "back.beton")
    assert back.mode.tolist() == [JPG, JPG, RAW]
    assert back.label.tolist() == [0, 10, 20]
    assert back.payload(1).tobytes() == progressive


def test_damaged_coefficients_leave_no_file(tmp_path: Path) -> None:
    changed = bytearray(code(2))
    changed[-1] ^= 1
    file = made_beton(tmp_path / "coded.beton", [code(1), bytes(changed), code(3)], 3 * [SIZE])
    with pytest.raises(BadImages, match="1 of 3 images cannot be stored, so nothing was written") as refused:
        write_jpegs(file, tmp_path / "back.beton", workers=1)
    assert refused.value.bad == [(f"{file} (sample 1)", OTHER_DIGEST)]
    assert [path.name for path in tmp_path.iterdir()] == ["coded.beton"]
    written = write_jpegs(file, tmp_path / "back.beton", workers=1, skip_bad=True)
    assert written.samples == 2
    assert Beton(tmp_path / "back.beton").label.tolist() == [0, 20]
    assert "(sample 1)" in (tmp_path / "back.beton.bad.txt").read_text()


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    file = made_beton(tmp_path / "coded.beton", [code(1)], [SIZE])
    jpegs = made_beton(tmp_path / "jpg.beton", [encoded(made_image(1, *SIZE), 2, 80)], [SIZE])
    with pytest.raises(UserError, match="holds no coefficients"):
        write_jpegs(jpegs, tmp_path / "back.beton")
    with pytest.raises(UserError, match="exists already"):
        write_jpegs(file, jpegs)
    with pytest.raises(UserError, match="is the source itself"):
        write_jpegs(file, file, force=True)
    for words, said in (
        ([file, tmp_path / "back.beton", "--quality", "80"], "as it is: leave out"),
        ([file, tmp_path / "back.beton", "--limit", "2"], "as it is: leave out"),
        ([file], "SRC and OUT.beton are needed"),
        (["--check", file], "--check takes a .beton file and nothing else"),
    ):
        assert run(["--to-jpeg", *words], monkeypatch) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "back.beton").exists()


@pytest.mark.slow
def test_ffcvs_own_reader_refuses_coefficients_and_reads_the_jpegs(tmp_path: Path) -> None:
    """In a sentence of its own: it would take coefficients for pixels."""
    pytest.importorskip("ffcv")
    file = made_beton(tmp_path / "coded.beton", [code(number) for number in (1, 2, 3)], 3 * [SIZE])
    write_jpegs(file, tmp_path / "back.beton", workers=1)
    outcomes = []
    for path in (file, tmp_path / "back.beton"):
        reader = [sys.executable, "-m", "tests.programs.stock_reader", path, tmp_path / "read.npz", "map"]
        outcomes.append(subprocess.run(reader, cwd=REPOSITORY, capture_output=True, text=True, check=False))
    assert outcomes[0].returncode == 1
    assert "file format mismatch: code=2,file=258" in outcomes[0].stderr
    assert outcomes[1].returncode == 0
    assert np.load(tmp_path / "read.npz")["labels"].tolist() == [0, 10, 20]
