"""A classifier's training as a checkpoint keeps it, and what a resumed one has to agree with."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.datasets import Engine, Labelled
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.renamed import refuse_old_classifier
from fastpmae.run.checkpoint import Checkpoint, CheckpointError, digest, newest_checkpoint, read_checkpoint, require
from fastpmae.run.init_weights import TUNED, few
from fastpmae.run.log import About, Log, read_rows
from fastpmae.run.session import Session
from fastpmae.run.uploads import Uploads
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import Typed

STATES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "lars": {"momentum_buffer"}}
"""What each optimizer keeps of a parameter."""


@dataclass(frozen=True)
class Setting(Typed):
    """Everything about a training that is no number in its `FinetuneConfig`."""

    backbone: Backbone
    train: Labelled
    val: Labelled
    folder: Path
    device: torch.device
    engine: Engine = "auto"
    workers: int = 0
    """Loader threads; 0 takes all cores."""
    crop_ratio: float = 0.875
    feature_batch: int = 64
    """Images at a time in a test, and through a frozen network."""
    frozen: bool = False
    """Train a linear classifier of the frozen network instead of the network."""
    deterministic: bool = False
    """On a GPU compute the same bits each time."""
    tensorboard: bool = False
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases too."""
    upload: Address | None = None
    """Where checkpoints, the log and the result are taken to."""


def recorded_setting(setting: Setting, config: FinetuneConfig) -> dict[str, Any]:
    """What decides the numbers of a training, as a checkpoint keeps it; `layers` says that sgd heeds --layer-decay."""
    return {
        "finetune": json.loads(json.dumps(dataclasses.asdict(config))),
        "backbone": describe_backbone(setting.backbone),
        "frozen": setting.frozen,
        "layers": True,
        "train": setting.train.describe(),
    }


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None = None
) -> dict[str, Tensor]:
    """Every tensor that the rest of a training depends on, by its name in a checkpoint: its own, not copies."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.module.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {
            f"optimizer.{name}.{key}": value
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
    return tensors


def take_up(
    setting: Setting,
    config: FinetuneConfig,
    resume: bool,
    record: dict[str, Any],
    steps_per_epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    ranks: Ranks,
) -> tuple[int, Float[Tensor, " 2"], list[str]]:
    """Take the folder's newest sound checkpoint up.

    Returns the steps that are done, the sum and number of losses since the last row, and a sentence for each damaged
    checkpoint that was passed over.
    """
    checkpoint, complaints = found_checkpoint(setting.folder, resume, {"epoch", "lr", "loss"}, "classifier's", ranks)
    if checkpoint is None:
        return 0, torch.zeros(2, dtype=torch.float64), []
    before, progress = checkpoint.progress["config"], checkpoint.progress
    refuse_old_classifier(before, str(checkpoint.path))
    recorded = [before.get(part, {}) for part in ("finetune", "backbone")]
    losses = progress.get("loss")
    if not (all(isinstance(part, dict) for part in recorded) and are_numbers(losses)):
        raise CheckpointError(f"{checkpoint.path} is damaged: its progress is none of a classifier's training")
    if "layers" not in before and config.opt == "sgd" and not before.get("frozen"):
        # an earlier version trained all layers at one rate, whatever it recorded
        recorded[0] = recorded[0] | {"layer_decay": 1.0}
    changed = config.differences(recorded[0], record["frozen"])
    changed += other_network(recorded[1], record["backbone"])
    if before.get("frozen") != record["frozen"]:
        changed.append(f"frozen was {before.get('frozen')}")
    if progress["fingerprint"] != record["train"]["fingerprint"] or progress["steps_per_epoch"] != steps_per_epoch:
        changed.append("the training images are others")
    if changed:
        raise UserError(f"the training in {setting.folder} was started with other settings: {'; '.join(changed)}")
    if progress["step"] > config.epochs * steps_per_epoch:
        raise CheckpointError(f"{checkpoint.path} stands after a step that this training does not have")
    _scatter(checkpoint, config, model, optimizer, ema)
    return progress["step"], torch.tensor(losses, dtype=torch.float64), complaints


def found_checkpoint(
    folder: Path, resume: bool, columns: set[str], whose: str, ranks: Ranks
) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint of a folder, where a training goes on there, and a sentence for each damaged one.

    It is that which the first rank finds: another machine's folder may hold a newer one.

    Args:
        columns, whose: see `check_no_others_files`.

    Raises:
        UserError: where all are damaged, there are others' files, or there is a training and `resume` is not given.
    """
    found: list[Checkpoint] = []

    def find() -> tuple[Path | None, list[str]]:
        checkpoint, complaints = newest_checkpoint(folder)
        if checkpoint is None and not complaints:
            check_no_others_files(folder, columns, whose)
        elif not resume:
            raise UserError(f"{folder} already holds a training: add --resume to continue it")
        elif checkpoint is None:
            raise UserError("; ".join(complaints))
        else:
            found.append(checkpoint)
        return None if checkpoint is None else checkpoint.path, complaints

    path, complaints = ranks.broadcast_from_main(find)
    if path is None:
        return None, complaints
    return found[0] if found else read_checkpoint(path), complaints


def begin(
    session: Session,
    folder: Path,
    about: About,
    *,
    step: int,
    last_step: int,
    lacks_row: bool,
    save_every: float,
    complaints: Sequence[str],
    uploads: Uploads | None,
) -> None:
    """Start a session of a training that goes on after a step, or begins with the first one.

    Args:
        lacks_row: whether the row of that step is still to be tested and written. It may be there all the same, of a
            training that was killed after it.
        save_every: minutes between two checkpoints.
        complaints: about damaged checkpoints that were passed over.
        uploads: take what is written to an address.
    """
    session.begin(
        folder,
        Log(folder, about, step - lacks_row, last_step, is_main=session.ranks.is_main),
        step=step,
        last_step=last_step,
        keep=1,
        save_every=save_every,
        saved_step=step or None,
        sentences=[f"{complaint}; continuing after step {step}" for complaint in complaints],
        uploads=uploads,
    )


def are_numbers(losses: Any) -> bool:
    """Whether these are the sum and the number of losses."""
    return isinstance(losses, list) and len(losses) == 2 and all(type(number) is float for number in losses)


def check_no_others_files(folder: Path, columns: set[str], whose: str) -> None:
    """Raise UserError where a training that starts would write over what no unfinished training has left.

    Args:
        columns: that a row of such a training has.
        whose: rows they would be, in the possessive.
    """
    for name in TUNED.values():
        if (folder / name).exists():
            raise UserError(f"{folder} holds a {name} and no checkpoint beside it: choose another --out")
    rows = folder / "metrics.jsonl"
    if rows.exists() and rows.stat().st_size:
        first = next(iter(read_rows(rows)), {})
        # A training that was killed before its first checkpoint leaves rows of its own.
        if not columns <= first.keys() or "loss_m" in first:
            raise UserError(f"{folder} holds a metrics.jsonl that is no {whose}: choose another --out")


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """The network that a training starts from, as a checkpoint keeps it."""
    network = backbone.build()
    heads = [part.num_heads for part in network.modules() if isinstance(getattr(part, "num_heads", None), int)]
    # No tensor tells the heads and what images are normalised by.
    told = json.dumps([heads, backbone.mean, backbone.std])
    return {
        "source": backbone.source,
        "network": backbone.network,
        "image_size": backbone.image_size,
        "digest": digest(network.state_dict(), told),
    }


def other_network(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is different about the network that a training starts from; the same weights may lie elsewhere by now."""
    if before.get("image_size") != now["image_size"]:
        return [f"--image-size was {before.get('image_size')} and is now {now['image_size']}"]
    if "digest" not in before:
        return ["an earlier version of fastpmae wrote it, without a digest of the network's weights"]
    if before["digest"] != now["digest"]:
        return [f"the network's weights are others, then of {before.get('source')}, now of {now['source']}"]
    return []


def _scatter(
    checkpoint: Checkpoint,
    config: FinetuneConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
) -> None:
    for name, module in (("model", model), ("ema", ema.module if ema is not None else None)):
        if module is not None:
            require(checkpoint, name, module.state_dict())
            module.load_state_dict(checkpoint.part(name))
    restore_optimizer(checkpoint, model, optimizer, STATES[config.opt])


def restore_optimizer(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, kept: set[str]
) -> None:
    """Put an optimizer's state back, as `collect_state` has named it.

    Args:
        kept: what the optimizer keeps of a parameter.

    Raises:
        CheckpointError: when a parameter's state holds something else, or is of another shape.
    """
    for name, parameter in model.named_parameters():
        state = checkpoint.part(f"optimizer.{name}")
        if state.keys() not in (set(), kept):
            raise CheckpointError(f"{checkpoint.path} does not fit: optimizer.{name} holds {few(sorted(state))}")
        for key, value in state.items():
            if value.shape != (torch.Size() if key == "step" else parameter.shape) or not value.is_floating_point():
                kind = str(value.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{checkpoint.path} does not fit: optimizer.{name}.{key} is {kind} {list(value.shape)}"
                )
        if state:
            found = {key: value.clone() for key, value in state.items()}
            # AdamW counts its steps on the host; moments lie where the parameter does.
            optimizer.state[parameter] = {
                key: value if value.ndim == 0 and parameter.ndim > 0 else value.to(parameter.device)
                for key, value in found.items()
            }
