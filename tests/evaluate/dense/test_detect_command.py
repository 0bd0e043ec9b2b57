"""`fastpmae-eval detect` as a user starts it: a folder in Pascal VOC's layout in, a network and figures out."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluate.dense.made import scene, start
from tests.evaluate.dense.test_segment_command import evaluated

WORDS = [
    "--preset", "small", "--epochs", "1", "--batch-size", "4", "--channels", "16", "--proposals", "20",
    "--boxes-per-image", "16", "--short-sides", "32", "64", "--test-short-side", "48", "--eval-every", "0",
    "--heads", "2", "--workers", "1", "--device", "cpu",
]  # fmt: skip


def folder_of_voc(folder: Path) -> Path:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, numbers in (("train", range(4)), ("val", range(20, 22))):
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{number}\n" for number in numbers))
        for number in numbers:
            pixels, _, boxes = scene(number)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{number}.jpg")
            rows = "".join(
                f"<object><name>{['red', 'blue'][label - 1]}</name><difficult>0</difficult><bndbox><xmin>{left}</xmin>"
                f"<ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for left, top, right, bottom, label in boxes
            )
            (folder / "Annotations" / f"{number}.xml").write_text(
                f"<annotation><filename>{number}.jpg</filename><size><width>56</width><height>40</height>"
                f"<depth>3</depth></size>{rows}</annotation>"
            )
    return folder


@pytest.mark.slow
def test_a_folder_in_a_network_and_figures_out(tmp_path: Path):
    pytest.importorskip("faster_coco_eval", reason="pip install 'fastpmae[dense]'")
    images, out = folder_of_voc(tmp_path / "set"), tmp_path / "out"
    start(tmp_path)
    done = evaluated("detect", tmp_path / "vit.pth", "--train", images, "--out", out, *WORDS)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "detect.json").read_text())
    assert (record["evaluation"], record["images"], record["classes"]) == ("detect", 2, 2)
    assert f"AP {record['ap']:.2f} %" in done.stdout
    for name in ("detector.safetensors", "detect-classes.csv", "detect-curves.png", "detect-overlays.png"):
        assert (out / name).exists(), name
