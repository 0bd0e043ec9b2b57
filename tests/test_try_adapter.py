"""The edits of docs/adapters.md: each is well formed, its lines work, and the script makes them and trains."""

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Names
from typing import Any

import numpy as np
import pytest
import timm.data
import torch

from fastpmae_loaders.adapters import IMAGENET_MEAN, IMAGENET_STD, Adapter
from tests.made import REPOSITORY


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


edits = loaded("adapter_edits", REPOSITORY / "scripts/adapters/edits.py")
CODEBASES = loaded("adapter_codebases", REPOSITORY / "scripts/adapters/codebases.py").CODEBASES
PAGE = (REPOSITORY / "docs/adapters.md").read_text()
SCRIPT = REPOSITORY / "scripts/try_adapter.py"

CODE = """
import os
class Loop:
    def run(self, args):
        first = make(
            args,
        )
        print(first)
        if args.many:
            first = make(args)
        last = (first,
                2)
        return last
"""


def edit(how: str, first: str, last: str = "", lines: str = "ours(\n    1,\n)\n") -> Any:
    return edits.Edit("a.py", how, first, last or first, lines)


def test_a_statement_gives_way_whole_and_the_lines_stand_where_it_stood():
    assert edits.applied(edit("in place of", "last = "), CODE).split("\n")[10:14] == [
        "        ours(",
        "            1,",
        "        )",
        "        return last",
    ]


def test_a_range_ends_with_the_end_of_its_last_statement():
    rows = edits.applied(edit("in place of", "print(first", "last = ", "ours()\n"), CODE).split("\n")
    assert rows[6:] == ["        )", "        ours()", "        return last", ""]


def test_lines_go_before_and_after_every_statement_that_begins_so():
    before = edits.applied(edit("before", "first = make(", lines="ours()\n"), CODE)
    assert before.count("ours()") == 2
    assert "        ours()\n        first = make(\n" in before
    assert "            ours()\n            first = make(args)" in before
    assert "        )\n        ours()\n" in edits.applied(edit("after", "first = make(", lines="ours()\n"), CODE)


def test_a_text_becomes_another_wherever_it_stands():
    assert edits.applied(edit("becomes", "args", "options"), CODE) == CODE.replace("args", "options")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (edit("in place of", "second = "), "0 statements begin with `second = `"),
        (edit("in place of", "first = "), "2 statements begin with `first = `"),
        (edit("in place of", "return last", "import os"), "no statement after `return last` begins with `import os`"),
        (edit("becomes", "second", "third"), "`second` is nowhere in it"),
    ],
)
def test_what_is_not_there_is_said(wrong, why):
    with pytest.raises(edits.EditError, match=why):
        edits.applied(wrong, CODE)


def test_a_section_without_edits_is_refused():
    with pytest.raises(edits.EditError, match="no section 'MAE on ice'"):
        edits.edits_of(PAGE, "MAE on ice")
    with pytest.raises(edits.EditError, match="describes no edit"):
        edits.edits_of(PAGE, "What holds for all of them")


def test_every_edit_of_the_page_is_read():
    """A sentence with a slip in it would else be passed over."""
    sections = {section for codebase in CODEBASES.values() for section in codebase.sections}
    read = sum(len(edits.edits_of(PAGE, section)) for section in sections)
    assert read == sum(map(PAGE.count, ("`, in place of `", "`, after `", "`, before `", "` becomes")))


def surroundings(folder: Path) -> dict[str, Any]:
    """What the codebases have at hand where their loaders are made, by their own names and with their own types."""
    beton = str(folder / "images.beton")
    args = argparse.Namespace(
        data_path=beton, data_dir=str(folder), batch_size=4, batch_size_per_gpu=4, num_workers=0, workers=0, seed=0,
        input_size=224, rank=0, world_size=1, local_crops_number=2, scale=[0.08, 1.0], ratio=[0.75, 4 / 3],
        global_crops_number=2, global_crops_scale=(0.14, 1.0), local_crops_scale=[0.05, 0.4], hflip=0.5,
        color_jitter=0.4, no_aug=False, train_interpolation="random", pred_ratio=[0.0, 0.3], pred_ratio_var=[0.0, 0.2],
        pred_shape="block", pred_start_epoch=0, reprob=0.25, remode="pixel", recount=1, validation_batch_size=None,
        model="mae_vit_huge_patch14", mask_ratio=0.75, ncrop_loss=None,
    )  # fmt: skip
    crops = Names(
        global_crops_size=56, local_crops_size=28, global_crops_scale=[0.32, 1.0], local_crops_scale=[0.05, 0.32],
        local_crops_number=2, teacher_to_student_resolution_scale=1.0, gram_teacher_crops_size=70,
        gram_teacher_no_distortions=False,
    )  # fmt: skip
    ranks = Names(get_rank=lambda: 0, get_world_size=lambda: 1, get_global_rank=lambda: 0, get_global_size=lambda: 1)
    train = Names(dataset_path=beton, batch_size_per_gpu=4, num_workers=0, seed=0)
    ibot = Names(mask_ratio_min_max=[0.1, 0.5], mask_sample_probability=0.5, mask_random_circular_shift=True)
    capi = Names(
        dataset=beton, crop_scale=[0.6, 1.0], do_hflip=True, mask_ratio=0.65, prediction_subsampling=0.05,
        masking_generator_kwargs={"roll": True},
    )  # fmt: skip
    data = Names(DATA_PATH=beton, BATCH_SIZE=4, IMG_SIZE=64, NUM_WORKERS=0, MASK_PATCH_SIZE=32, MASK_RATIO=0.6)
    return {
        "args": args, "misc": ranks, "utils": ranks, "distributed": ranks, "dist": ranks, "os": os, "np": np,
        "torch": torch,
        "cfg": Names(
            crops=crops, train=train, ibot=ibot, student=Names(patch_size=14), data=capi,
            optim=Names(batch_size_per_gpu=4), compute_precision=Names(param_dtype="bf16"),
            efficiency=Names(dataloader_num_workers=0, param_dtype="bfloat16"),
        ),
        "img_size": 56, "patch_size": 14, "iteration": 2, "per_device_batch_size": 4,
        "trainer_instance": Names(global_rank=0, world_size=1),
        "start_iter": 2, "pred_size": 16, "device": torch.device("cpu"), "epoch": 1, "model_dtype": torch.bfloat16,
        "mixup_args": {"num_classes": 230, "mixup_alpha": 0.2}, "Mixup": timm.data.Mixup,
        "config": Names(
            data=beton, seed=0, num_workers=0, DATA=data, SEED=0, MODEL=Names(TYPE="vit", VIT=Names(PATCH_SIZE=16))
        ),
        "data_config": {
            "input_size": (3, 64, 64), "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": 0.9,
            "interpolation": "bicubic",
        },
    }  # fmt: skip


def skeleton(changes: list[Any]) -> str:
    """A file that holds what the edits look for and nothing else."""
    rows: list[str] = []
    ours = ""
    for change in changes:
        for anchor in dict.fromkeys((change.first, change.last if change.how != "becomes" else change.first)):
            if anchor not in ours and anchor not in "\n".join(rows):
                end = {"(": ")", ":": " pass", ")": "", " ": "0"}.get(anchor[-1], "")
                rows.append(anchor + (" anything" if anchor.endswith(" import") else end))
        ours += change.lines + (change.last if change.how == "becomes" else "")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", CODEBASES)
def test_the_pages_lines_work(name, small_beton, tmp_path, monkeypatch):
    codebase = CODEBASES[name]
    changes = [change for section in codebase.sections for change in edits.edits_of(PAGE, section)]
    for other in ("images", "train", "validation"):
        shutil.copy(small_beton, tmp_path / f"{other}.beton")
    for path in dict.fromkeys(change.path for change in changes):
        here = [change for change in changes if change.path == path]
        theirs = text = skeleton(here)
        for change in here:
            text = edits.applied(change, text)
        ast.parse(text)
        if path != codebase.program:
            continue
        # what is left of the skeleton are its imports, of modules that are not there
        left = set(theirs.split("\n"))
        text = "\n".join(row for row in text.split("\n") if row not in left)
        for old, new in (('device="cuda"', 'device="cpu"'), *codebase.smaller):
            text = text.replace(old, new)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        names = surroundings(tmp_path)
        exec(text, names)
        made: list[Any] = [value for value in names.values() if isinstance(value, Adapter)]
        assert made
        for adapter in made:
            next(iter(adapter))
            assert adapter.num_workers in (0, 8)
            adapter.close()
        if name == "mae":
            assert names["loader"].epoch == 1
        if name.endswith("masks"):
            assert names["loader"].settings.patch_size == 14


LOOP = """
import sys
from types import SimpleNamespace
import util.misc as misc
import torch
args = SimpleNamespace(data_path=sys.argv[sys.argv.index("--data_path") + 1], batch_size=4, seed=0, input_size=224,
                       num_workers=0)
device = torch.device("cpu")
dataset_train = 0
print(dataset_train)
if True:
    pass
data_loader_train = 0
model = torch.nn.Linear(3 * 224 * 224, 1).cuda()
for epoch in range(4):
    train_stats = 0
    for samples, _ in data_loader_train:
        model(samples.flatten(1)).abs().mean().backward()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A codebase with what MAE's edits look for, that prints as MAE does."""
    folder = tmp_path / "checkout"
    (folder / "util").mkdir(parents=True)
    (folder / "util/misc.py").write_text(
        "import builtins\nimport torch\nfrom torch._six import inf\n"
        "def get_rank():\n    return 0\n"
        "def get_world_size():\n    return 1\n"
        "def replace():\n"
        "    own = builtins.print\n"
        "    def print(*args, **kwargs):\n        own('theirs:', *args, **kwargs)\n"
        "    builtins.print = print\n"
        "replace()\n"
    )
    (folder / "main_pretrain.py").write_text(LOOP)
    return folder


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_checkout_is_edited_in_a_copy_and_trained(checkout, small_beton, tmp_path):
    before = (checkout / "main_pretrain.py").read_text()
    done = run("mae", checkout, small_beton, "--steps", 3, "--keep", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "mae at an unknown commit: 4 edits of docs/adapters.md made in a copy"
    assert [line.split(":")[0] for line in lines[1:4]] == ["step 1", "step 2", "step 3"]
    assert lines[4] == f"3 steps with torch {torch.__version__} on a CPU"
    assert (checkout / "main_pretrain.py").read_text() == before
    assert "MAELoader(loader)" in (tmp_path / "kept/main_pretrain.py").read_text()


def test_a_checkout_that_does_not_fit_is_refused_in_a_sentence(checkout, small_beton, tmp_path):
    done = run("ibot", checkout, small_beton)
    assert done.returncode == 2
    assert done.stderr == f"try_adapter: {checkout} holds no main_ibot.py: it is no checkout for ibot\n"
    program = checkout / "main_pretrain.py"
    program.write_text(program.read_text().replace("data_loader_train = 0\n", ""))
    done = run("mae", checkout, small_beton)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "try_adapter: main_pretrain.py: 0 statements begin with `data_loader_train = `\n"
