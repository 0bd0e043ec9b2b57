"""What flags, settings and keys were called in earlier versions: whoever uses an old name is told the new one."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short

GROUPS = {"optimiser": "optimizer", "teachers": "teacher", "model": "network"}
"""Groups of a run's settings, in its config.json and in its checkpoints."""
SETTINGS = {"balance": "sinkhorn_over", "checkpoint_blocks": "activation_checkpointing"}
"""Settings of pretraining, and so the flags of `fastpmae-train` and `fastpmae-plan`."""
FINETUNE_SETTINGS = {
    "optimiser": "opt", "rand_augment": "aa", "erase": "reprob", "switch": "mixup_switch_prob",
    "jitter": "color_jitter", "ema": "model_ema_decay",
}  # fmt: skip
"""Settings of fine-tuning and of the probe, and so flags of `fastpmae-eval`."""
VALUES = {"sinkhorn_over": {"part": "micro-batch"}, "picture": {"learnt": "analysis"}}
"""Values of settings, and of the flag `--picture` of `fastpmae-view`, by what these are called now."""
FINETUNE_KEY = {"course": "finetune"}
"""The settings of a classifier's training, in its checkpoints and in its file."""


def refuse_old_flags(words: Sequence[str], settings: Mapping[str, str]) -> None:
    """Refuse a command line with a flag or a value of an earlier version.

    Args:
        words: the command line.
        settings: new names of the command's settings by the old ones.

    Raises:
        UserError: with what to write instead.
    """
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        if not equals:
            value = next(iter(words[place + 1 : place + 2]), "")
            value = "" if value.startswith("--") else value
        name = flag[2:].replace("-", "_")
        new = settings.get(name, name)
        new_value = VALUES.get(new, {}).get(value, value)
        if (new, new_value) != (name, value):
            before, now = (f"{a} {short(b)}".strip() for a, b in ((flag, value), (_flag(new), new_value)))
            raise UserError(f"{before} is now {now}")


def refuse_old_settings(groups: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Refuse a run's settings that an earlier version wrote, or that name something as it did.

    Its `lr` was the rate for 256 images and would be taken for the peak rate itself: an `lr` that has a value is taken
    only beside `"blr": null`, as this version writes it.

    Args:
        groups: settings by group and name, as in config.json and in a checkpoint.
        source: where they come from, for the sentence.

    Raises:
        UserError: with every old name and the new one.
    """
    found = []
    for group, settings in groups.items():
        if group in GROUPS:
            found.append(f"the group {group} is now {GROUPS[group]}")
        for name, value in settings.items():
            if name in SETTINGS:
                new = SETTINGS[name]
                new_value = VALUES.get(new, {}).get(value, value) if isinstance(value, str) else value
                changed = f" and its value {value} {new_value}" if new_value != value else ""
                found.append(f"{group}.{name} is now {new}{changed}")
            elif name == "lr" and value is not None and "blr" not in settings:
                found.append("lr, the rate for 256 images, is now blr, and lr the peak rate itself, beside blr: null")
    if found:
        raise UserError(
            f"{source} names settings as earlier versions did: {'; '.join(found)}. Rename them in a config; a run "
            "that was started so continues with the version that started it, and its encoder starts a new run by --init"
        )


def refuse_old_classifier(keys: Mapping[str, Any], source: str) -> None:
    """Refuse what an earlier version has left of a classifier's training. Raises UserError with the new name."""
    for old, new in FINETUNE_KEY.items():
        if old in keys:
            raise UserError(
                f"{source} is of an earlier version: the settings of its training are called {old!r} in it, now "
                f"{new!r}, and some of them have other names. Use the version that wrote it, or fine-tune again"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
