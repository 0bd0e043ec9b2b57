"""Every setting of a run, as one tree of frozen dataclasses.

Each leaf is a flag of `fastpmae-train` with the same name (`batch_size` is `--batch-size`), so names are unique over
the whole tree. The docstring under a field is its help text.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed, local_path

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""The modes of torch.compile that replay a function's kernels as one."""


@dataclass(frozen=True)
class Data(Typed):
    """Where the images come from."""

    beton: Path | None = None
    """The .beton file to pretrain on (`fastpmae-write` makes one); `--loader torch` and `dali` also read folders of
    images and tar shards."""
    loader: Literal["ffcv", "dali", "torch"] = "ffcv"
    """Engine that reads it: `ffcv` and `torch` give the same bytes; DALI's differ by its decoder and resize."""
    dali_part: int = 0
    """Images that DALI gets at a time; 0 takes 32 on the CPU and 64 on a GPU."""
    hw_decoder_load: float = 0.0
    """Share of the images that DALI decodes by a GPU's decoders in hardware, 0 to 1; their pixels differ slightly."""
    page_order: Literal["auto", "on", "off"] = "auto"
    """Shuffle page by page, which reads a disk in long stretches; auto does so where the file outgrows the memory."""
    bad_fraction: float = 0.01
    """Stop when more than this share of the images seen, and at least four of them, do not decode."""


@dataclass(frozen=True)
class Views(Typed):
    """What each image is turned into, and which view each teacher sees."""

    image_size: int = 224
    """Side of both views, in pixels."""
    mask_ratio: float = 0.75
    """Share of the patches that the student does not see."""
    folds: int = 3
    """K: the masked patches are shown to the teachers in this many folds."""
    simple_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the simple (MAE) view's crop, smallest and largest share of the image."""
    complex_scale: tuple[float, float] = (0.14, 1.0)
    """The same for the complex (DINO) view."""
    complex_recipe: Literal["coin", "t1", "t2"] = "coin"
    """Blur and solarise of the complex view: DINO's first or second global crop, or either by a coin."""
    reconstruction_view: Literal["simple", "complex"] = "simple"
    """View that the reconstruction teacher sees (the student always sees the simple one)."""
    labelling_view: Literal["simple", "complex"] = "complex"
    """View that the labelling teacher sees."""


@dataclass(frozen=True)
class Network(Typed):
    """Sizes of the networks."""

    model: str = "vit_base"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge, or the timm name of a plain ViT."""
    patch_size: int = 0
    """Side of a patch in pixels; 0 is the model's own (16, or 14 for vit_huge)."""
    width: int = 0
    """Token width; 0 is the model's own."""
    depth: int = 0
    """Blocks of the encoder; 0 is the model's own."""
    heads: int = 0
    """Attention heads of the encoder; 0 is the model's own."""
    drop_path: float = 0.25
    """Largest rate of stochastic depth, in the encoder's last block."""
    decoder_width: int = 512
    """Token width of the decoder."""
    decoder_depth: int = 8
    """Its blocks."""
    decoder_heads: int = 16
    """Its attention heads."""
    head_hidden: int = 2048
    """Width of the projection head's two hidden layers."""
    head_bottleneck: int = 256
    """Width of its output, in which tokens meet prototypes."""
    prototypes: int = 4096
    """P: prototypes for class tokens, and as many for patch tokens."""


@dataclass(frozen=True)
class TeacherSettings(Typed):
    """Which teachers there are and how they follow the student."""

    teachers: Literal["dual", "single", "reconstruction", "none"] = "dual"
    """Two teachers (the paper's), one for both roles, one for reconstruction alone (SdAE), or none (MAE)."""
    reconstruction_cadence: Literal["step", "epoch"] = "epoch"
    """How often the reconstruction teacher follows."""
    reconstruction_momentum: tuple[float, float] = (0.96, 0.99)
    """Its momentum, first and last, on a cosine."""
    labelling_cadence: Literal["step", "epoch"] = "step"
    """How often the labelling teacher (or a single one) follows."""
    labelling_momentum: tuple[float, float] = (0.996, 1.0)
    """Its momentum, first and last, on a cosine."""
    teacher_init: Literal["copy", "random"] = "copy"
    """Teachers start as copies of the student, or from random weights and positions of their own (SdAE's code)."""


@dataclass(frozen=True)
class Loss(Typed):
    """The losses of equations 1 to 5."""

    target: Literal["tokens", "pixels"] = "tokens"
    """What masked patches are reconstructed to: a teacher's tokens, or normalised pixels (MAE)."""
    lambda_m: float = 1.0
    """Weight of the reconstruction loss."""
    lambda_c: float = 1.0
    """Weight of the class pseudo-label loss."""
    lambda_p: float = 1.0
    """Weight of the patch pseudo-label loss."""
    cosine_axis: Literal["feature", "token"] = "feature"
    """Axis of the reconstruction cosine; "token" is what SdAE's released code does, over the tokens of each fold."""
    match_metric: Literal["cosine", "l2"] = "cosine"
    """How near a teacher patch is to a student patch."""
    match_scope: Literal["image", "fold"] = "image"
    """Match among all masked patches of the image, or within the fold."""
    student_temperature: float = 0.1
    """Divides the student's logits."""
    epsilon: float = 0.05
    """Temperature of the Sinkhorn assignment."""
    sinkhorn_iterations: int = 3
    """How often columns and rows of the assignment are normalised."""


@dataclass(frozen=True)
class Optimizer(Typed):
    """AdamW and its schedule."""

    epochs: int = 300
    """Passes over the images; the schedules stretch over them."""
    batch_size: int = 768
    """Images in one optimizer step, over all ranks and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches that a step's images are computed in, one after the other, on each rank."""
    sinkhorn_over: Literal["micro-batch", "step"] = "micro-batch"
    """Pseudo labels are balanced within a micro-batch, or over all of a step: then any --accumulate gives the same
    numbers, and the teachers' logits of all micro-batches are held at once."""
    blr: float = 2.666e-4
    """Peak learning rate for 256 images; it grows in proportion with the batch size."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; by default 20 % of all."""
    weight_decay: float = 0.05
    """Not on biases, norms and tokens."""
    decay_tokens: bool = False
    """On the class token and the mask token too, as MAE's and SdAE's code does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two averaging rates."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""


@dataclass(frozen=True)
class Run(Typed):
    """Where the run lives and what it leaves behind."""

    out: Path | None = None
    """Run folder; by default runs/<date>-<name>."""
    name: str = ""
    """Name of the run; by default the preset's."""
    preset: str = "paper"
    """The named settings that this run started from."""
    seed: int = 0
    """Decides views, masks, order, weights and stochastic depth."""
    steps: int | None = None
    """Stop after so many optimizer steps in all; changes no schedule."""
    init: Path | None = None
    """Start the encoder from these weights (MAE, timm or our own)."""
    resume: str | None = None
    """Go on with the run in --out ("auto", the default when no value follows) or from this checkpoint."""
    accept_changes: bool = False
    """Resume although settings differ from the run's own."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    save_every: float = 10.0
    """Minutes between two checkpoints; 0 saves after every step. The last step and a signal always save."""
    save_steps: int = 0
    """Also save every so many steps; 0 does not."""
    keep: int = 1
    """Older checkpoints to keep beside the newest."""
    eval_every: int = 0
    """Every so many epochs, and at the end, k-NN with the student and every teacher; 0 does not."""
    eval_train: Path | None = None
    """Labelled images that vote; by default the run's own."""
    eval_val: Path | None = None
    """Labelled images that are tested; by default those that vote, each left out once."""
    profile: int = 0
    """Write a trace of so many steps, by torch's profiler and after a warm-up, into the run folder; 0 does not."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases too, where it is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume is not None:
            local_path(self.resume)


@dataclass(frozen=True)
class Efficiency(Typed):
    """What changes speed and memory and not the method."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast; auto takes it on a GPU that has it, and fp32 elsewhere."""
    workers: int = 0
    """Loader threads of each rank; 0 takes all cores that the run may use, shared among the ranks of a machine."""
    augment_on: Literal["auto", "cpu", "device"] = "auto"
    """Where the complex view's colours are changed: by the loader's threads, or for whole batches on the device, within
    2/255 of the same result; auto does the latter on a GPU."""
    deterministic: bool = False
    """On a GPU, too, compute the same bits each time: somewhat slower, and on one GPU alone to the last bit. On the CPU
    every run does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the student, the teachers and the losses; auto compiles on a GPU."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """How: with CUDA graphs (not with `--accumulate`), or trying out kernels for minutes at the start, or both."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """torch's own attention, which auto takes, or xformers' (a GPU, and `pip install 'fastpmae[xformers]'`)."""
    teacher_precision: Literal["auto", "fp8"] = "auto"
    """fp8: the linear layers of the teachers' blocks in 8 bits (compute capability 8.9); auto: as the rest."""
    activation_checkpointing: int = 0
    """Of every so many blocks of the student one keeps its input alone and is computed anew in the backward pass: less
    memory, more time, the same numbers. 1 is every block, 0 none."""
    shard: bool = False
    """Shard weights, gradients, optimizer and teachers over the ranks (FSDP2): for models that fill a GPU."""
    rank_timeout: float = 10.0
    """Minutes that a rank waits for the others before all of them end."""
    prototypes_chunk: int = 0
    """Rows that the student's head sees at a time, gradients and all, and of the labelling teacher's patch logits,
    which are computed anew in each sweep: 9 % less memory for 0.8 % more FLOPs at ViT-B and batch 768, 5 % for 1.6 % at
    ViT-S and 64 (by the plan); 0 keeps everything."""


@dataclass(frozen=True)
class Config(Typed):
    """All settings of a run. Raises UserError from `check` where they do not fit together."""

    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    network: Network = field(default_factory=Network)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    efficiency: Efficiency = field(default_factory=Efficiency)

    def using(self, **settings: Any) -> "Config":
        """A copy with these settings changed, named as the flags are: `config.using(epochs=100, seed=1)`.

        A value becomes what its setting is where nothing is lost (1.0 the whole number 1, a text a path).

        Raises:
            UserError: for a name that is no setting, and a value that is not of its kind.
        """
        groups = settings_by_name()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in groups:
                raise UserError(f"there is no setting called {name!r}")
            changes.setdefault(groups[name], {})[name] = value
        return replace(self, **{group: replace(getattr(self, group), **new) for group, new in changes.items()})

    def groups(self) -> dict[str, dict[str, Any]]:
        """Every setting by group and name, as plain JSON values; `config_from` takes them back."""
        nested: dict[str, dict[str, Any]] = {}
        for name, group in settings_by_name().items():
            nested.setdefault(group, {})[name] = _plain(getattr(getattr(self, group), name))
        return nested

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, as plain JSON values."""
        return {name: value for group in self.groups().values() for name, value in group.items()}


def settings_by_name() -> dict[str, str]:
    """Each setting's name and the group it belongs to."""
    hints = get_type_hints(Config)
    return {leaf.name: group for group, kind in hints.items() for leaf in dataclasses.fields(kind)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
