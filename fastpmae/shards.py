"""Tar shards in WebDataset's layout: files that share a name up to its first dot are one sample."""

import json
import tarfile
from pathlib import Path

from fastpmae.errors import UserError
from fastpmae.sources import IMAGE_SUFFIXES, Item, Source, labels_from

_LABEL_LIMIT = 1 << 20  # a label file is a few bytes; more of it is not read
_BLOCK = 512


def list_shards(paths: list[str]) -> Source:
    """The images of tar files, with labels from their samples' .cls or .json members.

    Only headers and labels are read. A damaged shard costs its images after the damage, as one bad item.
    """
    items: list[Item] = []
    labels: list[int | str | None] = []
    bad: list[Item] = []
    source = Source(items)
    for path in paths:
        samples, others, damage = _list_shard(path)
        source.passed_over += others
        for sample in samples:
            offset, size, name = sample["image"]
            items.append(Item("tar", path, (offset, size, name), 0))
            labels.append(sample.get("label"))
        if damage:
            bad.append(Item("bad", path, (damage,), -1))
    numbers, source.class_names, source.notes = labels_from(labels)
    items[:] = [item._replace(label=label) for item, label in zip(items, numbers, strict=True)]
    items += bad
    return source


def _list_shard(path: str) -> tuple[list[dict], int, str | None]:
    samples: list[dict] = []
    others = 0
    sample: dict = {}
    try:
        length = Path(path).stat().st_size
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile() or member.issparse():
                    others += not member.isdir()
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if stem == "" or name.startswith("__"):
                    others += 1
                    continue
                if sample.get("key") != (folder, stem):
                    sample = {"key": (folder, stem)}
                suffix = "." + extension.lower().rpartition(".")[2]
                if suffix in IMAGE_SUFFIXES and "image" not in sample:
                    if member.offset_data + member.size > length:
                        return samples, others, f"the shard is truncated within {member.name}"
                    sample["image"] = (member.offset_data, member.size, member.name)
                    samples.append(sample)
                elif extension.lower() in ("cls", "json") and member.size <= _LABEL_LIMIT:
                    file = shard.extractfile(member)
                    _add_label(sample, extension.lower(), file.read() if file else b"")
                else:
                    others += 1
            damage = _damage_at(path, shard.offset)
    except tarfile.ReadError as error:
        empty = Path(path).stat().st_size == 0
        return samples, others, "the file is empty" if empty else f"not a sound tar file: {error}"
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return samples, others, f"not a sound tar file: {error}"
    return samples, others, damage


def _damage_at(path: str, offset: int) -> str | None:
    """tarfile takes a broken header in the midst of a file for the end of it; the end is a block of zeros."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
    if not block:
        return "the shard ends without the zeros that close a tar file: it is truncated"
    if block.strip(b"\0"):
        return f"the shard is damaged at byte {offset}: what follows there was not read"
    return None


def _add_label(sample: dict, extension: str, content: bytes) -> None:
    try:
        text = content.decode().strip()
        value = text
        if extension == "json":
            fields = json.loads(text)
            fields = fields if isinstance(fields, dict) else {}
            value = next((fields[key] for key in ("label", "cls", "class") if key in fields), None)
    except (ValueError, RecursionError):
        return
    if isinstance(value, str):
        value = value.strip()
        try:
            value = int(value)
        except ValueError:
            value = value or None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return
    if extension == "cls" or "label" not in sample:
        sample["label"] = value


def read_member(path: str, offset: int, size: int) -> bytes:
    """The bytes of one file within a shard."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise UserError("the shard is truncated")
    return data
