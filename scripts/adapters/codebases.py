"""How each codebase is tried: which edits, what is run, and the smallest settings that it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Codebase:
    """A codebase, or a variant of its edits.

    Attributes:
        sections: of docs/adapters.md, whose edits are made.
        program: what is run.
        arguments: its own. {images} is the file of images, {folder} one with train.beton and validation.beton, {out} a
            folder to write to, {classes} how many classes the images have.
        ranked: whether it wants to be one of a group of ranks.
        options: of on_cpu.py.
        smaller: for programs without arguments, texts and what is tried in their place.
        source: a folder of the checkout where its packages are.
        start: a program that starts `program`, which is a module of a package.
        needs_gpu: it does not start without one; only its edits are made, and looked at.
    """

    sections: tuple[str, ...]
    program: str
    arguments: tuple[str, ...] = ()
    ranked: bool = False
    options: tuple[str, ...] = ()
    smaller: tuple[tuple[str, str], ...] = ()
    source: str = ""
    start: str = ""
    needs_gpu: bool = False


_MAE = (
    *("--batch_size", "4", "--num_workers", "0", "--epochs", "2", "--warmup_epochs", "1", "--device", "cpu"),
    *("--data_path", "{images}", "--output_dir", "{out}", "--log_dir", "{out}"),
)
_SDAE = (*_MAE, "--model", "mae_vit_small_patch16", "--model_teacher", "vit_small_patch16")
_DINO = (
    *("--arch", "vit_tiny", "--out_dim", "64", "--batch_size_per_gpu", "4", "--num_workers", "0", "--epochs", "2"),
    *("--warmup_epochs", "1", "--warmup_teacher_temp_epochs", "1", "--local_crops_number", "2", "--use_fp16", "false"),
    *("--data_path", "{images}", "--output_dir", "{out}"),
)
_IBOT = (*_DINO, "--patch_out_dim", "64", "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2")
_DINOV2 = (
    *("--config-file", "dinov2/configs/train/vitl16_short.yaml", "--output-dir", "{out}"),
    *("train.dataset_path={images}", "train.batch_size_per_gpu=4", "train.num_workers=0", "student.arch=vit_small"),
    *("student.drop_path_rate=0", "student.block_chunks=1", "compute_precision.grad_scaler=false"),
    *("crops.local_crops_number=2", "dino.head_n_prototypes=64", "ibot.head_n_prototypes=64"),
)
_TIMM = (
    *("--data-dir", "{folder}", "--num-classes", "{classes}", "--model", "vit_tiny_patch16_224", "--batch-size", "4"),
    *("--workers", "0", "--device", "cpu", "--epochs", "1", "--mixup", "0.2", "--reprob", "0.25", "--output", "{out}"),
)
_SIMMIM = (
    *("--cfg", "configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml", "--local_rank", "0"),
    *("--batch-size", "4", "--amp-opt-level", "O0", "--data-path", "{images}", "--output", "{out}"),
    *("--opts", "DATA.NUM_WORKERS", "0", "MODEL.VIT.DEPTH", "2"),
)
_LIGHTLY_TRAIN = """
import sys
import lightly_train
lightly_train.pretrain(data=sys.argv[1], out=sys.argv[2], model="torchvision/resnet18", method="simclr", batch_size=4,
                       epochs=2, num_workers=0, accelerator="cpu", precision="32-true")
"""
_BOTH, _MASKS = "MAE and SdAE", "Our masks in MAE and SdAE"

CODEBASES = {
    "mae": Codebase((_BOTH,), "main_pretrain.py", (*_MAE, "--model", "mae_vit_base_patch16")),
    "mae-masks": Codebase((_BOTH, _MASKS), "main_pretrain.py", (*_MAE, "--model", "mae_vit_base_patch16")),
    "sdae": Codebase((_BOTH,), "main_pretrain.py", _SDAE),
    "sdae-masks": Codebase((_BOTH, _MASKS), "main_pretrain.py", (*_SDAE, "--shrink_num", "147", "--ncrop_loss", "3")),
    "dino": Codebase(("DINO",), "main_dino.py", _DINO, ranked=True),
    "ibot": Codebase(("iBOT",), "main_ibot.py", _IBOT, ranked=True),
    "dinov2": Codebase(("DINOv2",), "dinov2/train/train.py", _DINOV2, ranked=True, options=("--one-process",)),
    "timm": Codebase(("timm",), "train.py", _TIMM),
    "lightly-byol": Codebase(
        ("BYOL in lightly",), "examples/pytorch/byol.py", smaller=(('"images.beton", 256', '"images.beton", 4'),)
    ),
    "lightly-dino": Codebase(
        ("DINO in lightly",), "examples/pytorch/dino.py", smaller=(('"images.beton", 64', '"images.beton", 4'),)
    ),
    "lightly-train": Codebase(
        ("LightlyTrain",),
        "src/lightly_train/_commands/train.py",
        ("{images}", "{out}/run"),
        source="src",
        start=_LIGHTLY_TRAIN,
        # two views, since its distillation fetches a teacher
        smaller=(("views=views", "views=2 * views"),),
    ),
    "dinov3": Codebase(("DINOv3",), "dinov3/train/train.py", needs_gpu=True),
    "capi": Codebase(("CAPI",), "train_capi.py", needs_gpu=True),
    "simmim": Codebase(("SimMIM",), "main_simmim.py", _SIMMIM, ranked=True),
}
