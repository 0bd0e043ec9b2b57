"""From settings to networks: what a model's name stands for, and whether the settings fit together."""

import functools
import math
import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpmae.config import CUDA_GRAPHS, Config, Network
from fastpmae.model.fp8 import check_fp8_sizes
from fastpmae.model.head import Head
from fastpmae.model.initialization import initialise
from fastpmae.model.resolutions import check_resolutions
from fastpmae.model.vit import Decoder, Encoder, Student
from fastpmae_loaders import View, ViewSettings
from fastpmae_loaders.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The sizes that make a ViT."""

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


SHAPES = {
    "vit_tiny": Shape(16, 192, 12, 3),
    "vit_small": Shape(16, 384, 12, 6),
    "vit_base": Shape(16, 768, 12, 12),
    "vit_large": Shape(16, 1024, 24, 16),
    "vit_huge": Shape(14, 1280, 32, 16),
}


MOST: dict[str, int] = {
    "width": 2**16,
    "depth": 1000,
    "heads": 2**12,
    "decoder_width": 2**16,
    "decoder_depth": 1000,
    "decoder_heads": 2**12,
    "head_hidden": 2**20,
    "head_bottleneck": 2**20,
    "prototypes": 2**24,
    "sinkhorn_iterations": 10_000,
    "workers": 10_000,
    "rank_timeout": 10**6,
}
"""More than anybody needs: beyond it a setting, from a stranger's checkpoint say, would hang or fill the memory."""
SHARPEST = 1e-6
"""Of temperatures: cosines divided by less are no numbers that float32 tells apart."""
UNBOUNDED = ("seed", "save_every")
"""Settings with bounds of their own, or none."""


@functools.cache
def shape_of(model: Network) -> Shape:
    """The sizes of a model by its name, or by a timm name, with the settings that override them.

    Raises:
        UserError: for a name that nobody knows, or a timm model that is more than a plain ViT.
    """
    own = SHAPES[model.model] if model.model in SHAPES else _timm_shape(model.model)
    return Shape(
        model.patch_size or own.patch_size,
        model.width or own.width,
        model.depth or own.depth,
        model.heads or own.heads,
        own.mlp_ratio,
    )


def _timm_shape(name: str) -> Shape:
    import timm
    from timm.models.vision_transformer import Block as TimmBlock
    from timm.models.vision_transformer import VisionTransformer

    known = f"choose one of {', '.join(SHAPES)} or the timm name of a plain ViT, such as vit_base_patch16_224"
    if not timm.is_model(name):
        raise UserError(f"--model {name}: there is no such model; {known}")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        if not isinstance(model, VisionTransformer):
            raise UserError(f"--model {name}: it is no plain ViT but a {type(model).__name__}; {known}")
        image_size, patch_size = model.patch_embed.img_size, model.patch_embed.patch_size
        block: Any = model.blocks[0]
        block_type = type(block)
        if block_type is not TimmBlock or not isinstance(block.mlp.act, nn.GELU) or block.norm1.eps != 1e-6:
            raise UserError(f"--model {name}: its blocks are not those of a plain ViT; {known}")
        shape = Shape(
            patch_size[0],
            model.embed_dim,
            len(model.blocks),
            block.attn.num_heads,
            block.mlp.fc1.out_features / model.embed_dim,
        )
        ours = Encoder(
            image_size[0], shape.patch_size, shape.width, shape.depth, shape.heads, shape.mlp_ratio
        ).state_dict()
    theirs = {key: value for key, value in model.state_dict().items() if not key.startswith("fc_norm")}
    if model.fc_norm.state_dict():
        # Models that pool the patches keep their last norm under another name.
        theirs |= {f"norm.{key}": value for key, value in model.fc_norm.state_dict().items()}
    odd = sorted(
        key
        for key in ours.keys() | theirs.keys()
        if key not in ours or key not in theirs or ours[key].shape != theirs[key].shape
    )
    if odd:
        raise UserError(f"--model {name}: it is no plain ViT (it differs in {', '.join(odd[:3])}, ...); {known}")
    return shape


def check(config: Config) -> None:
    """Whether the settings make a run. Raises UserError with the flag that does not fit."""
    loss, teachers, optimizer, efficiency = config.loss, config.teacher, config.optimizer, config.efficiency
    _check_numbers(config)
    shape = shape_of(config.network)
    view_settings(config)
    labels = loss.lambda_c > 0 or loss.lambda_p > 0
    rules = [
        (shape.width % shape.heads == 0, f"--width {shape.width} is no multiple of --heads {shape.heads}"),
        (shape.width % 4 == 0, f"--width {shape.width} is no multiple of 4, which sine-cosine positions need"),
        (config.network.decoder_width % config.network.decoder_heads == 0 and config.network.decoder_width % 4 == 0,
         f"--decoder-width {config.network.decoder_width} is no multiple of 4 and of --decoder-heads"),
        (0 <= config.network.drop_path < 1, f"--drop-path {config.network.drop_path} is not in [0, 1)"),
        (not labels or teachers.teachers in ("dual", "single"),
         f"--teachers {teachers.teachers} gives no pseudo labels: set --lambda-c 0 --lambda-p 0, or another teacher"),
        (loss.target == "pixels" or teachers.teachers != "none",
         "--teachers none gives no target tokens: set --target pixels, or another teacher"),
        (loss.target == "tokens" or teachers.teachers == "none",
         f"--target pixels leaves the teachers idle: set --teachers none, not {teachers.teachers}"),
        (max(loss.lambda_m, loss.lambda_c, loss.lambda_p) > 0, "all three loss weights are 0"),
        (min(loss.lambda_m, loss.lambda_c, loss.lambda_p) >= 0, "a loss weight is negative"),
        *((temperature is None or temperature >= SHARPEST,
           f"--{name} must be at least {SHARPEST:g}: logits are divided by it in float32")
          for name, temperature in (("epsilon", loss.epsilon), ("class-epsilon", loss.class_epsilon),
                                    ("warmup-epsilon", loss.warmup_epsilon),
                                    ("student-temperature", loss.student_temperature))),
        (loss.sinkhorn_iterations >= 1, "--sinkhorn-iterations must be at least 1"),
        *((rate is None or rate >= 0, f"--{name} {rate} is negative")
          for name, rate in (("blr", optimizer.blr), ("lr", optimizer.lr))),
        (optimizer.weight_decay >= 0, f"--weight-decay {optimizer.weight_decay} is negative"),
        (optimizer.clip_grad >= 0, f"--clip-grad {optimizer.clip_grad} is negative; 0 does not clip"),
        (all(0 <= beta < 1 for beta in optimizer.betas), f"--betas {optimizer.betas} are not in [0, 1)"),
        (optimizer.epochs >= 1, f"--epochs {optimizer.epochs}: at least 1"),
        (optimizer.batch_size >= 1, f"--batch-size {optimizer.batch_size}: at least 1"),
        (optimizer.accumulate >= 1, f"--accumulate {optimizer.accumulate}: at least 1"),
        (0 <= warmup_epochs(config) <= optimizer.epochs,
         f"--warmup-epochs {optimizer.warmup_epochs} is not between 0 and --epochs {optimizer.epochs}"),
        (optimizer.pixel_epochs < 1 or optimizer.pixel_epochs.is_integer(),
         f"--pixel-epochs {optimizer.pixel_epochs}: a whole number of epochs, or a share of them below 1"),
        (0 <= optimizer.pixel_epochs < max(1, optimizer.epochs),
         f"--pixel-epochs {optimizer.pixel_epochs} leaves less than an epoch before or after it: there are "
         f"{optimizer.epochs} (--epochs)"),
        (0 <= optimizer.freeze_prototypes <= optimizer.epochs,
         f"--freeze-prototypes {optimizer.freeze_prototypes} is not between 0 and --epochs {optimizer.epochs}"),
        (teachers.momentum_for is None or teachers.momentum_for >= 0,
         f"--momentum-for {teachers.momentum_for}: epochs, or 0 for the run's own"),
        (loss.warmup_epsilon_epochs >= 0, f"--warmup-epsilon-epochs {loss.warmup_epsilon_epochs} is negative"),
        ((loss.warmup_epsilon is None) == (loss.warmup_epsilon_epochs == 0),
         "--warmup-epsilon and --warmup-epsilon-epochs go together: leave both out, or neither"),
        (config.run.log_every >= 1, f"--log-every {config.run.log_every}: at least 1"),
        (config.run.keep >= 0, f"--keep {config.run.keep}: 0 or more"),
        (config.run.eval_every >= 0, f"--eval-every {config.run.eval_every}: epochs, 0 or more"),
        (config.run.eval_every == 0 or not efficiency.shard,
         "--eval-every needs whole networks, which --shard has not: evaluate its checkpoints with fastpmae-eval"),
        (config.run.save_steps >= 0, f"--save-steps {config.run.save_steps}: 0 or more"),
        (config.run.profile >= 0, f"--profile {config.run.profile}: 0 or more"),
        (config.run.steps is None or config.run.steps >= 0, f"--steps {config.run.steps}: 0 or more"),
        (config.data.dali_part >= 0, f"--dali-part {config.data.dali_part}: images, or 0"),
        (0 <= config.data.hw_decoder_load <= 1,
         f"--hw-decoder-load {config.data.hw_decoder_load} is no share between 0 and 1"),
        (config.data.loader == "dali" or not (config.data.dali_part or config.data.hw_decoder_load),
         "--dali-part and --hw-decoder-load say nothing without --loader dali: leave them out"),
        (config.efficiency.workers >= 0, f"--workers {config.efficiency.workers}: 0 or more"),
        (config.efficiency.rank_timeout > 0, f"--rank-timeout {config.efficiency.rank_timeout}: minutes above 0"),
        (config.efficiency.prototypes_chunk >= 0,
         f"--prototypes-chunk {config.efficiency.prototypes_chunk}: rows, or 0 for all"),
        (efficiency.compile != "off" or efficiency.compile_mode == "default",
         f"--compile-mode {efficiency.compile_mode} says nothing beside --compile off: leave one out"),
        (optimizer.accumulate == 1 or efficiency.compile_mode not in CUDA_GRAPHS,
         f"--compile-mode {efficiency.compile_mode} keeps gradients where the next part's CUDA graph writes its own: "
         "with --accumulate choose default or max-autotune-no-cudagraphs"),
        (not efficiency.shard or efficiency.compile_mode not in CUDA_GRAPHS,
         f"--compile-mode {efficiency.compile_mode} replays kernels on weights that stay where they are, which --shard "
         "moves: choose default or max-autotune-no-cudagraphs"),
        (not efficiency.deterministic or not efficiency.compile_mode.startswith("max-autotune"),
         f"--compile-mode {efficiency.compile_mode} tries kernels out, and under --deterministic torch does not: "
         "choose default or reduce-overhead"),
        (not efficiency.deterministic or efficiency.attention != "xformers",
         "--attention xformers promises no order in which its gradients add up: with --deterministic choose sdpa"),
        (efficiency.activation_checkpointing >= 0,
         f"--activation-checkpointing {efficiency.activation_checkpointing}: every so many blocks, or 0 for none"),
        (config.run.save_every >= 0, f"--save-every {config.run.save_every} is negative"),
        (0 <= config.run.seed < 2**63, f"--seed {config.run.seed} is not between 0 and 2**63 - 1"),
        *((0 <= start <= 1 and 0 <= end <= 1, f"--{name} {start} {end} is not within 0 and 1")
          for name, (start, end) in (("labelling-momentum", teachers.labelling_momentum),
                                     ("reconstruction-momentum", teachers.reconstruction_momentum))),
    ]  # fmt: skip
    for fits, sentence in rules:
        if not fits:
            raise UserError(sentence)
    check_resolutions(config, view_settings(config))
    if efficiency.teacher_precision == "fp8":
        check_fp8_sizes(shape.width, int(shape.width * shape.mlp_ratio))


def check_label_schedules(config: Config) -> None:
    """Whether what is told of labels fits the epochs that have them: asked where a run begins, since it may go on.

    Raises:
        UserError: for a schedule that is longer than they are, and for settings of labels where there are none.
    """
    loss, freeze = config.loss, config.optimizer.freeze_prototypes
    given = {
        "--class-epsilon": loss.class_epsilon is not None, "--warmup-epsilon": loss.warmup_epsilon is not None,
        "--center-bottleneck": loss.center_bottleneck, "--freeze-prototypes": freeze > 0,
    }  # fmt: skip
    if config.teacher.teachers not in ("dual", "single"):
        if any(given.values()):
            flags = " and ".join(flag for flag in given if given[flag])
            raise UserError(f"--teachers {config.teacher.teachers} gives no pseudo labels: leave out {flags}")
        return
    first = pixel_epochs(config)
    epochs = config.optimizer.epochs - first
    there = f"of --epochs {config.optimizer.epochs}, {epochs} have labels" + f", after {first} of pixels" * (first > 0)
    # frozen for as long as there are labels, they would never be trained
    if freeze >= epochs:
        raise UserError(f"--freeze-prototypes {freeze} leaves no epoch in which prototypes are trained: {there}")
    if loss.warmup_epsilon_epochs > epochs:
        raise UserError(f"--warmup-epsilon-epochs {loss.warmup_epsilon_epochs} never reaches --epsilon: {there}")


def _check_numbers(config: Config) -> None:
    """Refuse what no rule could reason about: numbers that are not finite, sizes below 1."""
    for name, value in config.flat().items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{name.replace('_', '-')} {number} is no finite number")
            most = MOST[name] if name in MOST else 2**31 - 1
            if isinstance(number, int | float) and name not in UNBOUNDED and abs(number) > most:
                raise UserError(f"--{name.replace('_', '-')} {reprlib.repr(number)}: at most {most:,}")
    for name, size in vars(config.network).items():
        # the sizes of the encoder may be 0: then they are the model's own
        least = 0 if name in ("patch_size", "width", "depth", "heads") else 1
        if isinstance(size, int) and not isinstance(size, bool) and size < least:
            raise UserError(f"--{name.replace('_', '-')} {size}: at least {least}")


def view_settings(config: Config) -> ViewSettings:
    """The loader's settings for these views. Raises UserError where they make none."""
    views = config.views
    return ViewSettings(
        image_size=views.image_size,
        patch_size=shape_of(config.network).patch_size,
        mask_ratio=views.mask_ratio,
        folds=views.folds,
        simple_scale=views.simple_scale,
        complex_scale=views.complex_scale,
        complex_recipe=views.complex_recipe,
    )


def views_needed(config: Config) -> tuple[View, ...]:
    """The views that are looked at: the student's, and the complex one where a teacher sees it."""
    settings = view_settings(config)
    seen = [config.views.reconstruction_view] if config.loss.target == "tokens" else []
    if config.teacher.teachers in ("dual", "single"):
        seen.append(config.views.labelling_view)
    return settings.views if "complex" in seen else (settings.simple,)


def warmup_epochs(config: Config) -> float:
    """Epochs of warm-up: as set, or 20 % of all."""
    set_to = config.optimizer.warmup_epochs
    return 0.2 * config.optimizer.epochs if set_to is None else set_to


def pixel_epochs(config: Config) -> int:
    """Epochs of pixels before those of the run's own method; 0 where there are none, or where it has no teacher.

    A share leaves an epoch on either side, and a run of a single epoch has no room for two phases.
    """
    given, epochs = config.optimizer.pixel_epochs, config.optimizer.epochs
    if config.teacher.teachers == "none":
        return 0
    if 0 < given < 1:
        return min(max(1, round(given * epochs)), epochs - 1)
    return round(given)


def make_encoder(config: Config) -> Encoder:
    """The encoder of these settings, with weights as torch leaves them."""
    shape = shape_of(config.network)
    return Encoder(
        config.views.image_size,
        shape.patch_size,
        shape.width,
        shape.depth,
        shape.heads,
        shape.mlp_ratio,
        config.efficiency.activation_checkpointing,
    )


def build_student(config: Config) -> Student:
    """A student with weights as torch leaves them, on the CPU in fp32."""
    model, shape = config.network, shape_of(config.network)
    output = 3 * shape.patch_size**2 if config.loss.target == "pixels" else shape.width
    decoder = Decoder(
        config.views.image_size,
        shape.patch_size,
        shape.width,
        output,
        model.decoder_width,
        model.decoder_depth,
        model.decoder_heads,
        config.efficiency.activation_checkpointing,
    )
    head = None
    if config.teacher.teachers in ("dual", "single"):
        uniform = model.prototype_init == "uniform"
        head = Head(output, model.head_hidden, model.head_bottleneck, model.prototypes, uniform_prototypes=uniform)
    return Student(make_encoder(config), decoder, head)


def make_student(config: Config, generator: torch.Generator) -> Student:
    """The same with starting weights drawn from the generator."""
    student = build_student(config)
    initialise(student, generator)
    return student
