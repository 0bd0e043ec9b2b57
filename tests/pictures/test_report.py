"""fastpmae-report: the page as a real browser shows it."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae import Config, pretrain
from fastpmae.pictures import report as report_module
from fastpmae.pictures.report import write_report
from fastpmae.pictures.view import draw_run
from fastpmae.run import log
from fastpmae.run.checkpoint import checkpoints_in, read_checkpoint, write_checkpoint
from fastpmae.run.log import read_rows
from fastpmae.run.results import results_in
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from tests.made import REPOSITORY, write_tree

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  text: document.body.innerText,
  images: [...document.images].map(i => [i.id, i.naturalWidth, i.getBoundingClientRect().width]),
  resources: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")) }) })
</script>"""


def browse(page: Path, folder: Path) -> tuple[dict, np.ndarray]:
    """What a browser has of a page once it is loaded, and a picture of it."""
    assert BROWSER is not None
    copy = folder / "looked-at.html"
    copy.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    flags = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]

    def run(*more: str) -> str:
        return subprocess.run(
            [*flags, *more, copy.as_uri()], cwd=folder, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    found = re.search(r"<title>(.*?)</title>", run("--virtual-time-budget=5000", "--dump-dom"), re.DOTALL)
    assert found
    run(f"--screenshot={folder}/page.png", "--window-size=1200,3000", "--hide-scrollbars")
    return json.loads(html.unescape(found[1])), np.array(Image.open(folder / "page.png").convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; `make test` installs it where it can")
def test_in_a_browser(tiny: Config, small_beton: Path, tmp_path: Path):
    folder = pretrain(tiny.using(out=tmp_path / "a <b>bold & run", eval_every=1))
    (folder / "eval").mkdir()
    record = {"evaluation": "knn", "network": "student", "top1": 61.25, "top5": 90.0, "images": 44}
    (folder / "eval/knn-student.json").write_text(json.dumps(record))
    (folder / "eval/other.json").write_text("[1")
    page = Path(write_report(folder, beton=small_beton, samples=2))
    assert page == folder / "report.html"
    seen, picture = browse(page, tmp_path)
    # a name is text, whatever is in it
    assert seen["text"].startswith("a <b>bold & run\n")
    for words in ("preset demo", "steps", "15", "3.00", "61.25", "90.00", "head_bottleneck", "Curves", "prototypes"):
        assert words in seen["text"]
    # settings as the preset has them are folded away
    assert "sinkhorn_iterations" not in seen["text"]
    assert [name for name, *_ in seen["images"]] == ["curves", "picture-0", "picture-1"]
    assert all(natural > 500 and shown > 500 for _, natural, shown in seen["images"])
    assert seen["resources"] == []
    assert (picture.max(-1) - picture.min(-1) > 40).mean() > 0.05


@pytest.mark.slow
def test_evaluations_can_be_told_apart(tiny: Config, tmp_path: Path):
    folder = pretrain(tiny.using(steps=1))
    record = {"network": "student", "top1": 50.0, "top5": 90.0, "images": 44, "image_size": 32}
    record["source"] = f"demo, {folder}/checkpoints/step-00000001.safetensors"
    record["train"], record["val"] = {"path": "/a/birds/train.beton"}, {"path": "/a/birds/val.beton"}
    results = {
        "a": {
            "evaluation": "knn",
            "shown": {"pool": "mean", "k": 10},
            "date": "2026-02-02T10:00:00",
            "leave_one_out": True,
        },
        "b": {"evaluation": "lowshot", "table": [{"share": 0.01}], "pool": "class", "date": "2026-02-01T10:00:00"},
        "c": {"evaluation": "linear-sgd", "chosen": 0.3, "table": [{"rate": 0.3}], "date": "2026-02-03T10:00:00"},
        "step-00000001/a": {"evaluation": "finetune", "finetune": {"epochs": 5, "pool": "mean"}, "date": "2026-02-04"},
        "odd": {"top1": 3},
    }
    for name, more in results.items():
        (folder / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "eval" / f"{name}.json").write_text(json.dumps(more if name == "odd" else record | more))
    text = Path(write_report(folder)).read_text()
    table = text.split('id="evaluations">')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [(row[0], row[4]) for row in rows] == [
        ("lowshot", "1 % of the labels, class token, 32 px"),
        ("knn", "k = 10, mean of the patches, each left out once, 32 px"),
        ("linear-sgd", "rate 0.3, 32 px"),
        ("finetune", "5 epochs, mean of the patches, 32 px"),
    ]
    assert 'id="dense"' not in text
    masks = {"evaluation": "patches", "miou": 36.25, "pixel_accuracy": 80.0, "class_accuracy": 45.5, "shown": {"k": 30}}
    plain = {name: value for name, value in record.items() if not name.startswith("top")}
    (folder / "eval" / "patches.json").write_text(json.dumps(plain | masks))
    (folder / "eval" / "detect.json").write_text(json.dumps(plain | {"evaluation": "detect", "ap": 31.0, "ap50": 56.0}))
    (folder / "eval" / "broken.json").write_text(json.dumps(plain | masks | {"miou": float("nan")}))
    text = Path(write_report(folder)).read_text()
    assert len(text.split('id="evaluations">')[1].split("</table>")[0].split("<tr>")) == 6
    dense = text.split('id="dense">')[1].split("</table>")[0]
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in dense.split("<tr>")[2:]]
    assert [(row[0], row[5]) for row in found] == [
        ("detect", "AP 31.00 %, AP50 56.00 %"),
        ("patches", "mIoU 36.25 %, pixel accuracy 80.00 %, class accuracy 45.50 %"),
    ]
    assert all(row[1:4] == ["student", "1", "birds/val.beton"] for row in rows)
    assert rows[0][-1] == "2026-02-01 10:00"


@pytest.mark.slow
@pytest.mark.parametrize("samples", [0, -1, 65])
def test_a_number_of_samples_that_makes_no_picture(tiny: Config, samples: int):
    folder = pretrain(tiny.using(steps=1))
    with pytest.raises(UserError, match=f"--samples {samples} make no picture"):
        write_report(folder, samples=samples)


@pytest.mark.slow
def test_a_run_that_has_just_begun(tiny: Config, tmp_path: Path):
    folder = pretrain(tiny.using(steps=1))
    shutil.rmtree(folder / "checkpoints")
    text = Path(write_report(folder, tmp_path / "early.html")).read_text()
    assert "no checkpoint yet" in text
    assert "Fewer than two rows" in text


def test_figures_and_marks_of_sizes_of_views():
    """Each size has its own rate and loss, and every change a mark; a stranger's numbers make no more of them."""
    rows = [
        {"step": 10.0 * number, "loss": 9.0 - number, "lr": 0.1, "images_per_second": rate, "image_size": size}
        for number, (rate, size) in enumerate([(90.0, 48), (80.0, 48), (50.0, 64), (40.0, 64), (1.0, float("nan"))])
    ]
    figures = dict(report_module._figures(Config(), rows[:4]))
    assert figures["images/s at 48 px, median"] == "90"
    assert figures["images/s at 64 px, median"] == "50"
    assert figures["loss, last at 48 px"] == "8.00"
    assert figures["loss, last at 64 px"] == "6.00"
    plain = dict(report_module._figures(Config(), [{**row, "image_size": 0} for row in rows]))
    assert "images/s, median" in plain
    assert not any("px" in name for name in (*plain, *dict(report_module._figures(Config(), rows[4:]))))
    figure = report_module._curves(rows[:4])
    marks = [float(np.asarray(line.get_xdata())[0]) for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert marks == [10.0]
    many = [{**rows[0], "step": float(step), "image_size": 16 + step % 2} for step in range(200)]
    marks = [line for line in report_module._curves(many).axes[0].lines if line.get_linestyle() == ":"]
    assert len(marks) == report_module.MOST_MARKS


@pytest.mark.slow
def test_images_that_have_gone(tiny: Config, small_beton: Path, tmp_path: Path):
    beton = tmp_path / "moved.beton"
    shutil.copy(small_beton, beton)
    folder = pretrain(tiny.using(beton=beton, steps=2))
    beton.unlink()
    assert "are not here" in Path(write_report(folder)).read_text()
    with pytest.raises(UserError, match=r"none\.beton"):
        write_report(folder, tmp_path / "other.html", beton=tmp_path / "none.beton")
    assert not (tmp_path / "other.html").exists()


@pytest.mark.slow
def test_a_run_whose_decoder_had_no_class_token(tiny: Config, small_beton: Path, tmp_path: Path):
    """Its curves and settings are shown as ever; its networks are none that this version has."""
    sdae = tiny.using(teachers="reconstruction", lambda_c=0.0, lambda_p=0.0, loader="torch", steps=2, log_every=1)
    folder = pretrain(sdae)
    (checkpoint,) = checkpoints_in(folder)
    found = read_checkpoint(checkpoint)
    settings = json.loads((folder / "config.json").read_text())
    for groups in (found.progress["config"], settings):
        groups["network"]["decoder_class_token"] = False
    write_checkpoint(checkpoint, found.tensors, found.progress, keep=0)
    (folder / "config.json").write_text(json.dumps(settings))
    page = Path(write_report(folder, tmp_path / "old.html")).read_text()
    assert 'id="curves"' in page
    assert "newest checkpoint: step 2" in page
    assert "<code>teachers</code></td><td>&#34;reconstruction&#34;" in page
    assert 'id="picture-' not in page
    (remark,) = re.findall(r'id="remark">(.*?)</p>', page)
    assert remark.startswith(f"There are no pictures of what was learnt: {checkpoint} asks for a decoder without the")
    with pytest.raises(UserError, match="asks for a decoder without the class token"):
        draw_run(folder, small_beton, tmp_path / "learnt.png")
    assert not (tmp_path / "learnt.png").exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_no_report(tiny: Config, tmp_path: Path):
    folder = pretrain(tiny.using(loader="torch", steps=2, save_steps=1, keep=5))
    newest, sound = checkpoints_in(folder)
    newest.write_bytes(newest.read_bytes()[:100])
    page = Path(write_report(folder, tmp_path / "sound.html")).read_text()
    assert "newest checkpoint: step 1" in page
    assert 'id="picture-' in page
    sound.unlink()
    page = Path(write_report(folder, tmp_path / "none.html")).read_text()
    assert 'id="curves"' in page
    (remark,) = re.findall(r'id="remark">(.*?)</p>', page)
    assert "there is no sound checkpoint" in remark


@pytest.mark.slow
def test_a_folder_of_images(tiny: Config, tmp_path: Path):
    images = write_tree(tmp_path / "images", 12)
    folder = pretrain(tiny.using(beton=images, loader="torch", steps=1, batch_size=4))
    done = []

    class Counted(Progress):
        def advance(self, count: int = 1) -> None:
            done.append(count)

    text = Path(write_report(folder, samples=2, progress=Counted())).read_text()
    assert done == [1, 1, 1, 1]
    assert "are not here" not in text
    assert text.count("<img ") == 2  # one row makes no curves


def test_rows_that_are_no_rows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "note": "x"}\n[1]\n{"loss": 3}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 2.0}]
    assert read_rows(tmp_path / "none") == []


ROWS = {
    "a number of 400 digits": '{"step": 1' + "0" * 400 + ', "loss": 1}',
    "a value of 400 digits": '{"step": 1, "loss": 1' + "0" * 400 + ', "lr": -1e308}',
    "no number": '{"step": NaN, "loss": 1}',
    "no end": '{"step": Infinity, "loss": 1}',
    "before the start": '{"step": -5, "loss": 1}',
    "depth": "[" * 100_000,
    "another kind": '{"step": "1", "loss": 1}',
}
"""Lines of a stranger's metrics.jsonl."""


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_strangers(kind: str, tiny: Config, tmp_path: Path):
    """They are passed over by the report and by a run that goes on."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.groups()))
    path = tmp_path / "metrics.jsonl"
    sound = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": Infinity, "lr": NaN}']
    path.write_text("\n".join([sound[0], ROWS[kind], sound[1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Path(write_report(tmp_path)).read_text()
    assert "<b>2</b>steps" in text
    assert 'id="curves"' in text
    log._drop_rows_past(path, 1)
    left = path.read_text().splitlines()
    assert left[0] == sound[0]
    assert left[1:] == ([ROWS[kind]] if kind == "a value of 400 digits" else [])


def test_files_of_a_stranger_that_never_end(tiny: Config, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.groups()))
    (tmp_path / "eval").mkdir()
    for name in ("machine.jsonl", "eval/knn.json"):
        os.mkfifo(tmp_path / name)
    write_report(tmp_path)
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: not a regular file"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"top1": 10**400},
        {"top1": float("nan")},
        {"top5": -1},
        {"images": float("inf")},
        {"images": 10**30},
        {"chosen": 10**400, "table": [{"rate": 1}]},
        {"evaluation": "lowshot", "table": [{"share": 10**400}]},
    ],
)
def test_results_of_strangers(more: dict, tmp_path: Path):
    record = {"evaluation": "knn", "network": "student", "top1": 61.25, "top5": 90.0, "images": 44}
    (tmp_path / "a.json").write_text(json.dumps(record))
    (tmp_path / "b.json").write_text(json.dumps(record | more))
    (tmp_path / "c.json").write_text("[" * 100_000)
    assert [result.images for result in results_in(tmp_path)] == [44]


@pytest.mark.slow
def test_command_line(tmp_path: Path):
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-m", "fastpmae.pictures.report", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
    assert "Traceback" not in done.stderr
