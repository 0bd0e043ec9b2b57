"""Every setting of a run, as one tree of frozen dataclasses.

Each leaf is a flag of `fastpmae-train` with the same name (`batch_size` is `--batch-size`), so names are unique over
the whole tree. The docstring under a field is its help text.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fastpmae.settings.rates import check_one_rate, peak_rate, with_one_rate
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import Address, parse_address, place_of
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.values import Typed, local_path

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""The modes of torch.compile that replay a function's kernels as one."""


@dataclass(frozen=True)
class Data(Typed):
    """Where the images come from."""

    beton: Path | tuple[str, ...] | None = None
    """The .beton file to pretrain on, or a set of them (`fastpmae-write` makes both); `--loader torch` and `dali` also
    read folders of images and tar shards. Several are mixed, by the weight behind each: `a.beton:0.7 b/:0.3`. Either
    may lie in a store (s3://, gs://, az://, https://)."""
    cache: Path | None = None
    """Folder that keeps parts of what lies in a store; by default fastpmae/stores in the user's folder of caches."""
    cache_size: str = "100GB"
    """Size up to which that folder grows, as 200GB or 1.5TiB; what was not used for longest goes first."""
    loader: Literal["native", "ffcv", "dali", "torch"] = DEFAULT_ENGINE
    """Engine that reads the images: `native`, `ffcv` and `torch` give the same bytes; those of `dali` differ slightly
    by its decoder and resize."""
    dali_part: int = 0
    """Images in each batch that DALI decodes; 0 means 32 on the CPU and 64 on a GPU."""
    hw_decoder_load: float = 0.0
    """Share of the images that DALI decodes with a GPU's hardware decoders, 0 to 1; their pixels differ slightly."""
    page_order: Literal["auto", "on", "off"] = "auto"
    """Shuffle page by page, which reads a disk in long stretches; auto does so for sets and files above the memory."""
    bad_fraction: float = 0.01
    """Stop when more than this share of the images seen, and at least four of them, do not decode."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "beton", _named(self.beton))
        super().__post_init__()
        _ = self.cached

    @property
    def cached(self) -> CacheSettings:
        """Where what lies in a store is kept. UserError for a size that is none."""
        return CacheSettings(self.cache, self.cache_size)


@dataclass(frozen=True)
class Views(Typed):
    """What each image is turned into, and which view each teacher sees."""

    image_size: int = 224
    """Side of both views in pixels."""
    progressive_resolution: tuple[str, ...] = ()
    """Smaller views first, as SIZE:SHARE ... SIZE: `128:0.5 224` is half of the epochs at 128 pixels and the rest at
    224. The last size must be --image-size, at which --eval-every evaluates always; none is larger, all are multiples
    of the patch size, and each takes whole epochs. Schedules go on over a change. By default there is none."""
    mask_ratio: float = 0.75
    """Share of the patches that the student does not see."""
    folds: int = 3
    """K, the number of folds in which the teachers see the masked patches."""
    simple_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop of the simple (MAE) view: smallest and largest share of the image."""
    complex_scale: tuple[float, float] = (0.14, 1.0)
    """Area of the complex (DINO) view's crop, smallest and largest share of the image."""
    complex_recipe: Literal["coin", "t1", "t2"] = "coin"
    """Blur and solarise of the complex view: DINO's first or second global crop, or either by a coin."""
    reconstruction_view: Literal["simple", "complex"] = "simple"
    """View that the reconstruction teacher sees (the student always sees the simple view)."""
    labelling_view: Literal["simple", "complex"] = "complex"
    """View that the labelling teacher sees."""


@dataclass(frozen=True)
class Network(Typed):
    """Sizes of the networks."""

    model: str = "vit_base"
    """The encoder: vit_tiny, vit_small, vit_base, vit_large, vit_huge, or the timm name of a plain ViT."""
    patch_size: int = 0
    """Side of a patch in pixels; 0 takes the model's own (16, or 14 for vit_huge)."""
    width: int = 0
    """Token width of the encoder; 0 takes the model's own."""
    depth: int = 0
    """Number of blocks in the encoder; 0 takes the model's own."""
    heads: int = 0
    """Attention heads of the encoder; 0 takes the model's own."""
    drop_path: float = 0.25
    """Rate of stochastic depth in the encoder's last block; it grows linearly from 0 in the first."""
    decoder_width: int = 512
    """Token width of the decoder."""
    decoder_depth: int = 8
    """Number of decoder blocks."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    head_hidden: int = 2048
    """Width of the two hidden layers of the projection head."""
    head_bottleneck: int = 256
    """Width of the projection head's output, which is multiplied with the prototypes."""
    prototypes: int = 4096
    """P, the number of prototypes for class tokens, and the same number for patch tokens."""
    prototype_init: Literal["normal", "uniform"] = "normal"
    """How prototypes start: normal with a std of 0.02, or uniform as torch's linear layers, which is how DINO, iBOT and
    MC-SSL start them (a norm of 0.58, and so slower to turn)."""


@dataclass(frozen=True)
class TeacherSettings(Typed):
    """Which teachers there are and how they follow the student."""

    teachers: Literal["dual", "single", "reconstruction", "none"] = "dual"
    """Two teachers (as in the paper), a single one for both roles, one for reconstruction only (SdAE), or none
    (MAE)."""
    reconstruction_cadence: Literal["step", "epoch"] = "epoch"
    """How often the reconstruction teacher is updated from the student."""
    reconstruction_momentum: tuple[float, float] = (0.96, 0.99)
    """EMA momentum of the reconstruction teacher at the start and at the end, on a cosine schedule."""
    labelling_cadence: Literal["step", "epoch"] = "step"
    """How often the labelling teacher (or a single teacher) is updated from the student."""
    labelling_momentum: tuple[float, float] = (0.996, 1.0)
    """EMA momentum of the labelling teacher at the start and at the end, on a cosine schedule."""
    teacher_init: Literal["copy", "random"] = "copy"
    """Teachers start as copies of the student, or from random weights and positions of their own (SdAE's code)."""
    momentum_for: int | None = None
    """Take the momenta as meant for the paper's 300 epochs (500,000 steps), and raise them to the power with which as
    much is forgotten in so many epochs; 0, or no number, for this run's own. An end of 1 stays 1. By default the
    momenta hold as they are."""


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
    """Axis over which the cosine of the reconstruction loss is taken; `token` does as SdAE's released code, over the
    tokens of each fold."""
    match_metric: Literal["cosine", "l2"] = "cosine"
    """Measure by which the teacher patch nearest to a student patch is found."""
    match_scope: Literal["image", "fold"] = "image"
    """Match each student patch among all masked patches of its image, or among those of its fold."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax over the prototypes."""
    epsilon: float = 0.05
    """Temperature of the Sinkhorn assignment that makes the pseudo labels."""
    class_epsilon: float | None = None
    """Temperature of the Sinkhorn assignment of class tokens alone; by default --epsilon."""
    warmup_epsilon: float | None = None
    """Value of --epsilon in the first epoch, from which it goes to its own linearly over --warmup-epsilon-epochs, as
    DINO's warmup_teacher_temp; --class-epsilon goes in proportion. By default there is no schedule."""
    warmup_epsilon_epochs: int = 0
    """Epochs over which --warmup-epsilon goes to --epsilon."""
    center_bottleneck: bool = False
    """Subtract from the labelling teacher's features, which the prototypes are compared with, their mean over the batch
    before they are normalised; those of class and patch tokens apart."""
    sinkhorn_iterations: int = 3
    """Number of Sinkhorn iterations: column and row normalisations of the assignment."""


@dataclass(frozen=True)
class Optimizer(Typed):
    """AdamW and its schedule."""

    epochs: int = 300
    """Passes over the images; the schedules stretch over them."""
    batch_size: int = 768
    """Images in one optimizer step, over all ranks and micro-batches."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches of each step on each rank."""
    sinkhorn_over: Literal["micro-batch", "step"] = "micro-batch"
    """Run Sinkhorn within each micro-batch, or over all micro-batches of a step: then any --accumulate gives the same
    numbers, and the teachers' logits of all micro-batches are in memory at once."""
    blr: float | None = 2.666e-4
    """Base learning rate: the peak for a batch of 256 images, which grows in proportion with the batch size."""
    lr: float | None = None
    """Peak learning rate itself, whatever the batch size; given instead of --blr."""
    warmup_epochs: float | None = None
    """Epochs of linear learning-rate warm-up; by default 20 % of all."""
    pixel_epochs: float = 0.0
    """Epochs at the start, of those of --epochs, in which the student learns to reconstruct pixels without a teacher,
    as in MAE; below 1 a share of them, with an epoch at least on either side. Teachers (with --teacher-init copy),
    decoder, head and optimizer then begin anew with its encoder, and all schedules with them. Says nothing where
    --teachers is none."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; not applied to biases, norms and tokens."""
    decay_tokens: bool = False
    """Apply weight decay to the class token and the mask token too, as MAE's and SdAE's code does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta coefficients."""
    freeze_prototypes: int = 0
    """Epochs at the start in which the prototypes are not trained, as with DINO's freeze_last_layer."""
    clip_grad: float = 0.0
    """Clip the gradient to this norm; 0 does not clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_rate(self.blr, self.lr)

    @property
    def peak_lr(self) -> float:
        """The learning rate that the warm-up ends in."""
        return peak_rate(self.blr, self.lr, self.batch_size)


@dataclass(frozen=True)
class Run(Typed):
    """Where the run lives and what it leaves behind."""

    out: Path | None = None
    """Folder of the run; by default runs/<date>-<name>. At an address in a store it is what --upload says."""
    upload: str | None = None
    """Address in a store (s3://, gs://, az://) to which checkpoints and log are taken, and from which they come back
    where a run is resumed; without --out the run's folder of this machine then lies beside --cache."""
    name: str = ""
    """Name of the run; by default the preset's."""
    preset: str = "paper"
    """The named settings that this run started from."""
    seed: int = 0
    """Seed of views, masks, order of images, initial weights and stochastic depth."""
    steps: int | None = None
    """Stop after so many optimizer steps in all; changes no schedule."""
    init: str | None = None
    """Start the encoder from the weights in this file (MAE's, timm's or our own), here or in a store."""
    resume: str | None = None
    """Resume the run in --out ("auto", the default when no value follows) or from this checkpoint. That of a run in a
    store takes the run up there, and needs no --out."""
    accept_changes: bool = False
    """Resume although settings differ from those that the run was started with."""
    log_every: int = 20
    """Optimizer steps between two rows of metrics.jsonl."""
    save_every: float = 10.0
    """Minutes between two checkpoints; 0 saves after every step. The last step and a signal always save."""
    save_steps: int = 0
    """Optimizer steps between further checkpoints, beside those of --save-every; 0 writes none."""
    keep: int = 1
    """Number of older checkpoints to keep beside the newest."""
    eval_every: int = 0
    """Epochs between two evaluations (k-NN, linear probe) of the student and every teacher, one at the end; 0: none."""
    eval_train: Path | tuple[str, ...] | None = None
    """Labelled images whose features --eval-every learns from, wherever those of --beton may lie; by default the run's
    own."""
    eval_val: Path | tuple[str, ...] | None = None
    """Labelled images that --eval-every classifies; by default those that it learns from, each left out once."""
    profile: int = 0
    """Write a trace of so many steps, by torch's profiler and after a warm-up, into the run folder; 0 does not."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases too, where it is installed."""

    def __post_init__(self) -> None:
        address = Address.of_text(self.out)
        if address is not None:
            object.__setattr__(self, "upload", str(address))
            object.__setattr__(self, "out", None)
        object.__setattr__(self, "eval_train", _named(self.eval_train))
        object.__setattr__(self, "eval_val", _named(self.eval_val))
        super().__post_init__()
        if self.upload is not None:
            object.__setattr__(self, "upload", str(parse_address(self.upload)))
        if self.init is not None:
            object.__setattr__(self, "init", str(place_of(self.init)))
        named = Address.of_text(self.resume)
        if named is not None:
            object.__setattr__(self, "resume", str(named))
            if self.out is None and self.upload is None:
                object.__setattr__(self, "upload", str(run_at(named)))
        elif self.resume is not None:
            local_path(self.resume)


@dataclass(frozen=True)
class Efficiency(Typed):
    """What changes speed and memory and not the method."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation: `bf16` is autocast; auto takes it on a GPU that supports it, and fp32 elsewhere."""
    workers: int = 0
    """Loader threads of each rank; 0 takes all cores that the run may use, shared among the ranks of a machine."""
    augment_on: Literal["auto", "cpu", "device"] = "auto"
    """Where the complex view's colours are changed: by the loader's threads, or for whole batches on the device, within
    2/255 of the same result; auto does the latter on a GPU."""
    deterministic: bool = False
    """Compute the same bits each time on a GPU too: somewhat slower, and on one GPU alone to the last bit. On the
    CPU every run does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile for the student, the teachers and the losses; auto compiles on a GPU."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile: reduce-overhead uses CUDA graphs (not with `--accumulate`), max-autotune-no-cudagraphs
    benchmarks kernels for minutes at the start, and max-autotune does both."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Attention implementation: torch's own, which auto takes, or xformers' (a GPU, and `pip install
    'fastpmae[xformers]'`)."""
    teacher_precision: Literal["auto", "fp8"] = "auto"
    """Precision of the teachers: `fp8` computes the linear layers of their blocks in 8 bits (compute capability
    8.9); auto computes as the student does."""
    activation_checkpointing: int = 0
    """Checkpoint every n-th block of the student: only its input is kept, and it is recomputed in the backward pass.
    Less memory, more time, the same numbers. 1 checkpoints every block, 0 none."""
    shard: bool = False
    """Shard weights, gradients, optimizer state and teachers over the ranks (FSDP2): for models that fill a GPU."""
    sharded_checkpoints: bool = False
    """Write checkpoints as folders, each rank its part, for models whose one file is too large; both are resumed."""
    rank_timeout: float = 10.0
    """Minutes that a rank waits for the others before all ranks exit."""
    prototypes_chunk: int = 0
    """Compute the student's head, with its gradients, and the labelling teacher's patch logits for this many rows at a
    time; the logits are recomputed in each Sinkhorn iteration. 9 % less memory for 0.8 % more FLOPs at ViT-B and batch
    768, 5 % for 1.6 % at ViT-S and 64 (by the plan); 0 keeps everything."""


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

        A value becomes what its setting is where nothing is lost (1.0 the whole number 1, a text a path). `lr` takes
        the place of `blr`, and `blr` of `lr`.

        Raises:
            UserError: for a name that is no setting, a value that is not of its kind, and `blr` and `lr` together.
        """
        groups, settings = settings_by_name(), with_one_rate(settings)
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


def run_at(address: Address) -> Address:
    """The run that an address belongs to: of a checkpoint's the folder around its folder, else the address itself."""
    return address.parent.parent if address.parent.name == "checkpoints" else address


def settings_by_name() -> dict[str, str]:
    """Each setting's name and the group it belongs to."""
    hints = get_type_hints(Config)
    return {leaf.name: group for group, kind in hints.items() for leaf in dataclasses.fields(kind)}


def _named(images: Any) -> Any:
    """Sources of images, before they are typed, of which an address stands among several: it is no path."""
    address = Address.of_text(images)
    return images if address is None else (str(address),)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
