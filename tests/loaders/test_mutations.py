"""Hundreds of damaged .beton files through the reader, the check and the engines: never a crash, one clear error.

What is proven of memory: each sample that opens is decoded and made into views with every array that is read or
written (payload, decoded pixels, scratch, views, masks) ending, or beginning, at a page that kills who touches it.
"""

from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders import PairedViews, UserError
from fastpmae_loaders.sources.jpeg import jpeg_size, turbo_decode
from fastpmae_loaders.write.check import check_beton
from tests.engines import needs_ffcv
from tests.loaders.files import write_beton
from tests.loaders.hostile import SEED, blocks, coded, write_sound
from tests.loaders.mutations import VIEWS, mutation


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound"))


@pytest.mark.slow
def test_hostile_files_on_every_engine(sound: Path) -> None:
    """For thousands of them: `python -m tests.loaders.hostile`."""
    print(blocks(sound, 300))


@pytest.mark.slow
def test_the_check_itself_survives(sound: Path, tmp_path: Path) -> None:
    """`fastpmae-write --check` with its worker processes; the blocks call what those processes run."""
    contents = [path.read_bytes() for path in sorted(sound.glob("*.beton"))]
    opened = 0
    for number in range(40):
        what, content = mutation(contents, SEED, number)
        path = tmp_path / "hostile.beton"
        path.write_bytes(content)
        try:
            checked = check_beton(path)
        except UserError as error:
            assert str(path) in str(error), what  # noqa: PT017 - it may raise or not
            continue
        opened += 1
        assert all(reason and reason.isprintable() for _, reason in checked.bad)
        if opened == 4:
            break
    assert opened == 4


def without(payload: bytes, marker: int) -> bytes:
    """A JPEG whose segments of one kind are gone."""
    at, kept = 2, [payload[:2]]
    while payload[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        if payload[at + 1] != marker:
            kept.append(payload[at:end])
        at = end
    return b"".join([*kept, payload[at:]])


@needs_ffcv
@pytest.mark.parametrize("progressive", [False, True])
def test_no_image_is_decoded_with_the_tables_of_another(tmp_path: Path, progressive: bool) -> None:
    """libjpeg keeps its tables from image to image: what a thread showed before would decide what it shows now."""
    whole = coded(1, 61, 47, progressive=progressive)
    images = [whole, without(whole, 0xDB), whole, without(whole, 0xC4), whole]
    file = write_beton(tmp_path / "tables.beton", images, [(61, 47)] * 5)
    settings = {"settings": VIEWS, "shuffle": False, "bad_fraction": 1.0, "workers": 1}
    shown = []
    for engine in ("ffcv", "torch"):
        with PairedViews(file, 5, engine, **settings) as views:
            batch = next(iter(views))
            shown.append((batch.failed, batch.samples.tolist()))
        with PairedViews(file, 1, engine, **settings) as views:
            alone = [batch.failed for batch in views]
        assert [index for failed in alone for index in failed] == shown[-1][0]
    assert shown[0] == shown[1]
    assert 1 in shown[0][0]


@pytest.mark.slow
@needs_ffcv
def test_the_engines_agree_on_what_is_bad(tmp_path: Path) -> None:
    """Hundreds of damaged JPEGs, many of which libjpeg decodes with a warning: shown, or bad, on both engines alike."""
    rng = np.random.default_rng(1)
    images, warned = [], 0
    for number in range(400):
        data = bytearray(coded(number % 7, 48, 40, progressive=number % 2 == 0))
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(2, len(data))] = rng.integers(0, 256)
        if number % 5 == 0:
            del data[rng.integers(2, len(data)) :]
        images.append(bytes(data))
    file = write_beton(tmp_path / "damaged.beton", images, [(48, 40)] * 400)
    batches = []
    for engine in ("ffcv", "torch"):
        with PairedViews(file, 400, engine, VIEWS, shuffle=False, bad_fraction=1.0) as views:
            batches.append(next(iter(views)))
    first, second = batches
    assert first.failed == second.failed
    assert first.samples.tolist() == second.samples.tolist()
    difference = (first.simple.int() - second.simple.int()).abs().float().flatten(1).mean(1)
    for index in sorted(set(range(400)) - set(first.failed)):
        if jpeg_size(images[index]) != (48, 40) or turbo_decode(images[index], 48, 40) is None:
            warned += 1
            assert difference[index] == 0  # Pillow's pixels on both
    assert warned > 50
    # the rest differs by the two decoders' DCT alone, but where damage drives it out of its range
    assert difference.median() < 1.5
