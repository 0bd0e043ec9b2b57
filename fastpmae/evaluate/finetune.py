"""Training a classifier on augmented images: fine-tuning a whole ViT, or MAE's linear probe on a frozen one.

The folder holds `checkpoints/`, `metrics.jsonl` (a row each epoch), and at the end `classifier.safetensors`.
"""

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastpmae.distributed.ranks import to_device
from fastpmae.evaluate.augment import START, STEP, Mixing, RandAugment, drawn_from
from fastpmae.evaluate.backbone import features
from fastpmae.evaluate.datasets import engine_for, half
from fastpmae.evaluate.finetune_state import Setting, collect_state, recorded_setting, take_up
from fastpmae.evaluate.metrics import Scores, rank
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.run.checkpoint import checkpoint_path
from fastpmae.run.checkpoint_writer import Saver
from fastpmae.run.deterministic import deterministic
from fastpmae.run.folder import lock_folder
from fastpmae.run.signals import Stop
from fastpmae.weights.tensor_file import save_tensors
from fastpmae_loaders import PairedViews, PlainViews
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import Interrupted, RunError, UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.values import checked


class Probe(nn.Module):
    """MAE's linear probe: features scaled by a BatchNorm without parameters, and a linear layer."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(rows))


def make_classifier(
    setting: Setting, config: FinetuneConfig
) -> tuple[nn.Module, Callable[[Float[Tensor, "batch 3 side side"]], Tensor]]:
    """What is trained, and what it is given of normalised images: the images themselves, or frozen features."""
    classes = len(setting.train.names)
    with drawn_from(START, config.seed):
        if not setting.frozen:
            model = setting.backbone.build(classes, config.pool, config.drop_path)
            return model.to(setting.device), lambda images: images
        frozen: Any = setting.backbone.build().to(setting.device).eval()
        probe = Probe(frozen.num_features, classes)

    def encode(images: Float[Tensor, "batch 3 side side"]) -> Tensor:
        with torch.no_grad():
            return features(frozen, images, (config.pool,))[0].float()

    return probe.to(setting.device), encode


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, with timm's groups for layer-wise decay of the rate."""
    if config.opt == "adamw" and not isinstance(model, Probe):
        vit: Any = model
        groups = param_groups_layer_decay(
            model, config.weight_decay, vit.no_weight_decay(), layer_decay=config.layer_decay
        )
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas)
    # As MAE's LARS: biases and norms take the plain rate, without decay.
    wide = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay}
    thin = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    if config.opt == "adamw":
        return torch.optim.AdamW([wide, thin], lr=config.peak_lr, betas=config.betas)
    if config.opt == "sgd":
        return torch.optim.SGD([wide, thin], lr=config.peak_lr, momentum=0.9)
    momentum: Any = 0.9  # timm says int
    return Lars([wide | {"always_adapt": True}, thin | {"always_adapt": False}], lr=config.peak_lr, momentum=momentum)


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """timm's schedule by the step: linear from 0 over the warm-up, then a cosine to the lowest rate."""
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - warmup),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


@checked
def train_classifier(
    setting: Setting,
    config: FinetuneConfig,
    *,
    resume: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Train, test, and leave the classifier in the folder; returns the last test's scores.

    Args:
        resume: go on with the folder's newest sound checkpoint, where there is one, to the same numbers.
        steps: stop after so many steps in all, with a checkpoint; changes no schedule.

    Raises:
        UserError: for images that make no batch, a folder that holds a training, or a resume with other settings.
        RunError: when the loss is no longer finite, or a checkpoint cannot be written.
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the checkpoint is written.
    """
    progress = progress or Progress()
    setting = dataclasses.replace(setting, workers=loader_threads(setting.workers))
    if setting.frozen and (fitted := config.fitted(len(setting.train.labels))) != config:
        # MAE's batch for its probe is larger than many a set of images.
        progress.tell(
            f"--batch-size {config.batch_size} is more than there are images: a step takes {fitted.batch_size}, and "
            f"the peak learning rate is {fitted.peak_lr:.3g} instead of {config.peak_lr:.3g}"
        )
        config = fitted
    if len(setting.train.labels) < config.batch_size:
        raise UserError(
            f"{setting.train.samples.path} holds {len(setting.train.labels)} images, less than one batch of "
            f"{config.batch_size}: choose a smaller --batch-size"
        )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        stack.enter_context(deterministic(setting.deterministic, setting.device))
        for remark in stack.enter_context(lock_folder(setting.folder)):
            progress.tell(remark)
        saver = stack.enter_context(Saver(setting.device, keep=1))
        loader = stack.enter_context(_loader(setting, config))
        changes = stack.enter_context(
            RandAugment(
                config.aa,
                setting.backbone.image_size,
                setting.backbone.mean,
                config.seed,
                # a process more than there are images would have nothing to do
                min(setting.workers, config.micro_batch),
            )
        )
        steps_per_epoch = len(loader) // config.accumulate
        model, encode = make_classifier(setting, config)
        optimizer = make_optimizer(model, config)
        schedule = make_schedule(optimizer, config, steps_per_epoch)
        # Without its warm-up an average with DeiT's 0.99996 is nine tenths the start, after 2,000 steps.
        ema = (
            ModelEmaV3(model, config.model_ema_decay, use_warmup=True, warmup_power=0.75)
            if config.model_ema_decay
            else None
        )
        mixing = Mixing(config, len(setting.train.names), setting.device)
        record = recorded_setting(setting, config)
        step, sums, complaints = take_up(setting, config, resume, record, steps_per_epoch, model, optimizer, ema)
        for complaint in complaints:
            progress.tell(f"{complaint}; going on after step {step}")
        sums = sums.to(setting.device)
        last = config.epochs * steps_per_epoch
        last = last if steps is None else min(last, steps)
        low = half(setting.device)
        tested = ema.module if ema is not None else model
        # A frozen network sees a large batch piece by piece; images that are mixed have to stay together.
        piece = setting.feature_batch if setting.frozen and not config.mixes else config.micro_batch
        saved, saved_at = step or None, time.monotonic()

        def loss_of(images: UInt8[Tensor, "batch 3 side side"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
            pieces = []
            for some, of_some in zip(images.split(piece), labels.split(piece), strict=True):
                changed, target = mixing(setting.backbone.normalised(some), of_some)
                pieces.append((encode(changed), target))
            given, targets = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
            return -(targets * model(given).float().log_softmax(dim=1)).sum(dim=1).mean()

        def stop_if_bad() -> None:
            # The checkpoint before stays the newest.
            if not torch.isfinite(sums[0]):
                epoch = (step - 1) // steps_per_epoch + 1
                raise RunError(f"a loss of epoch {epoch} is not finite; a lower --blr usually helps")

        def save() -> None:
            nonlocal saved, saved_at
            stop_if_bad()
            saver.wait()
            state = {
                "step": step,
                "steps_per_epoch": steps_per_epoch,
                "bad_images": 0,
                "fingerprint": str(record["train"]["fingerprint"]),
                "config": record,
                "loss": sums.tolist(),
            }
            saver.save(checkpoint_path(setting.folder, step), collect_state(model, optimizer, ema), state)
            saved, saved_at = step, time.monotonic()

        def is_late() -> bool:
            return time.monotonic() - saved_at >= 60 * config.save_every

        def lacks_row() -> bool:
            return step % steps_per_epoch == 0 and bool(sums[1] > 0)

        def end_epoch() -> Scores | None:
            """Write the epoch's row, with a test where one is due; nothing when a signal ends the test."""
            stop_if_bad()
            epoch = step // steps_per_epoch
            schedule.step_update(step - 1)  # a training that is resumed here has set no rate yet
            row = {
                "epoch": epoch,
                "step": step,
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "loss": (sums[0] / sums[1]).item(),
            }
            found = None
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                found = evaluate_classifier(setting, encode, tested, progress, stop)
                if found is None:
                    return None
                row |= found.figures()
            _write_row(setting.folder, row)
            progress.tell(_sentence(row, config.epochs))
            sums.zero_()
            return found

        # A signal leaves the row of an epoch that is not tested yet to the resumed training: a test may take longer
        # than whoever sends the signal waits.
        scores = end_epoch() if lacks_row() else None
        while step < last and not stop.signal:
            scores, epoch = None, step // steps_per_epoch
            ends = min((epoch + 1) * steps_per_epoch, last)
            parts = _parts(loader, changes, setting, epoch, step % steps_per_epoch * config.accumulate)
            with progress.count((ends - step) * config.batch_size, "images"), contextlib.closing(parts):
                while step < ends and not stop.signal:
                    schedule.step_update(step)
                    model.train()
                    saver.before_update()  # a BatchNorm moves its means in the forward pass
                    for part in range(config.accumulate):
                        images, labels = next(parts)
                        with drawn_from(STEP, config.seed, step, part), low:
                            loss = loss_of(images, labels)
                        (loss / config.accumulate).backward()
                        sums += torch.stack([loss.detach(), torch.ones_like(loss)])
                    if config.clip_grad:
                        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    if ema is not None:
                        ema.update(model, step)
                    progress.advance(config.batch_size)
                    if saver.failed:
                        saver.wait()
                    if is_late() or step == last:
                        save()
            if lacks_row() and not stop.signal:
                scores = end_epoch()
        if stop.signal:
            if saved != step:
                save()
            saver.wait()
            raise Interrupted(stop.signal, step, last, setting.folder)
        saver.wait()
        write_classifier(setting, tested, config)
        scores = scores or evaluate_classifier(setting, encode, tested, progress, stop)
        if scores is None:
            raise Interrupted(stop.signal, step, last, setting.folder)
        return scores


@torch.inference_mode()
def evaluate_classifier(
    setting: Setting, encode: Callable[[Tensor], Tensor], model: nn.Module, progress: Progress, stop: Stop
) -> Scores | None:
    """The classifier's scores on the validation set; None where a signal came before the end."""
    model.eval()
    ranked = []
    views = PlainViews(
        setting.val.samples,
        setting.feature_batch,
        image_size=setting.backbone.image_size,
        crop_ratio=setting.crop_ratio,
        engine=engine_for(setting.val.samples, setting.engine),
        workers=setting.workers,
        pin_memory=setting.device.type == "cuda",
    )
    with views, progress.count(len(setting.val.labels), "test images"), half(setting.device):
        for images, _, _ in views:
            if stop.signal:
                return None
            ranked.append(rank(model(encode(setting.backbone.normalised(to_device(images, setting.device)))).float()))
            progress.advance(len(images))
    return Scores(setting.val.labels, torch.cat(ranked))


def write_classifier(setting: Setting, model: nn.Module, config: FinetuneConfig) -> None:
    """The trained weights, under timm's names where it is a whole network, and in the header what they need besides."""
    backbone = setting.backbone
    header = {
        "format": "pt",
        **({"timm": json.dumps(timm_arguments_of(model))} if isinstance(model, VisionTransformer) else {}),
        "classes": json.dumps(setting.train.names),
        "finetune": json.dumps(dataclasses.asdict(config)),
        "backbone": backbone.source,
        "mean": json.dumps(backbone.mean),
        "std": json.dumps(backbone.std),
        "crop_ratio": json.dumps(setting.crop_ratio),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(setting.folder / "classifier.safetensors") as beside:
        save_tensors(tensors, beside, header)


def timm_arguments_of(model: VisionTransformer) -> dict[str, Any]:
    """What `timm.create_model` needs to build a ViT of these sizes with its classifier."""
    vit: Any = model
    # What timm made by a name may have parts that no size tells (another activation, a norm before the blocks).
    made = getattr(vit, "pretrained_cfg", None) or {}
    parts: dict[str, Any] = {}
    if not isinstance(vit.blocks[0].ls1, nn.Identity):
        parts["init_values"] = 1e-5  # that there is a LayerScale; its values are among the weights
    if not isinstance(vit.blocks[0].attn.q_norm, nn.Identity):
        parts["qk_norm"] = True
    if vit.no_embed_class:
        parts["no_embed_class"] = True
    if vit.num_reg_tokens:
        parts["reg_tokens"] = vit.num_reg_tokens
    if not vit.has_class_token:
        parts["class_token"] = False
    return {
        "model_name": made.get("architecture") or "vit_base_patch16_224",
        "img_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        "global_pool": vit.global_pool,
        "fc_norm": isinstance(vit.fc_norm, nn.LayerNorm),
        "num_classes": vit.num_classes,
        **parts,
    }


def _loader(setting: Setting, config: FinetuneConfig) -> PairedViews:
    samples = setting.train.samples
    return PairedViews(
        samples,
        config.micro_batch,
        engine=engine_for(samples, setting.engine),
        seed=config.seed,
        workers=setting.workers,
        views=[config.view(setting.backbone.image_size)],
        drop_last=True,
        pin_memory=setting.device.type == "cuda",
    )


def _parts(
    loader: PairedViews, changes: RandAugment, setting: Setting, epoch: int, first: int
) -> Generator[tuple[UInt8[Tensor, "batch 3 side side"], Int[Tensor, " batch"]], None, None]:
    """Batches of an epoch from `first` on, on the device; RandAugment works on the next one meanwhile."""
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": first})
    ahead: deque[tuple[Any, np.ndarray]] = deque()
    for batch in loader:
        ahead.append((changes.submit(batch.simple.numpy(), epoch, batch.samples), batch.samples))
        if len(ahead) > 1:
            yield _handed_over(*ahead.popleft(), setting)
    while ahead:
        yield _handed_over(*ahead.popleft(), setting)


def _handed_over(begun: Any, samples: np.ndarray, setting: Setting) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(RandAugment.collect(begun))
    labels = setting.train.labels[torch.from_numpy(samples)]
    return to_device(images, setting.device), to_device(labels, setting.device)


def _write_row(folder: Path, row: dict[str, float]) -> None:
    """Append a row, in the place of rows of the same epoch or later ones that a killed run has left."""
    path = folder / "metrics.jsonl"
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["epoch"] < row["epoch"]:
                kept.append(line)
    with atomic_write(path) as beside:
        beside.write_text("\n".join([*kept, json.dumps(row)]) + "\n")


def _sentence(row: dict[str, float], epochs: int) -> str:
    tested = f", top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %" if "top1" in row else ""
    return f"epoch {row['epoch']:.0f}/{epochs}: loss {row['loss']:.4f}{tested}"
