"""A file that a command writes, here or at an address: looked at before any work, written whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fastpmae_loaders.cli.outputs import check_output
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.stores.address import Address, place_of
from fastpmae_loaders.write.store_target import StoreTarget


@dataclass(frozen=True)
class Output:
    """A file to be written; `open_output` makes it.

    Attributes:
        place: its path or address.
        force: replace what is there.
        target: the folder in the store that it is put in.
    """

    place: Path | Address
    force: bool
    target: StoreTarget | None

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A place of this machine to write it, of the same name. UserError where it cannot be written."""
        if self.target is None:
            with atomic_write(Path(self.place), self.force) as beside:
                yield beside
        else:
            with self.target.writing(self.place.name) as beside:
                yield beside


def open_output(
    out: str | PathLike[str] | Address, *, force: bool = False, inputs: Iterable[str | PathLike[str]] = ()
) -> Output:
    """See, before any work, that a command may write a file (see `check_output`).

    Args:
        force: what is there may be replaced.
        inputs: what the command reads; of addresses and paths alike.

    Raises:
        UserError: when it may not; for an address within 20 s.
    """
    place, read = place_of(out), [place_of(path) for path in inputs]
    if isinstance(place, Path):
        check_output(place, force=force, inputs=[path for path in read if isinstance(path, Path)])
        return Output(place, force, None)
    if not place.key:
        raise UserError(f"{place} names a bucket and no file: write {place}/NAME")
    for path in read:
        if isinstance(path, Address) and f"{place}/".startswith(f"{path}/"):
            raise UserError(f"{place} is what this command reads: name another file to write")
    target = StoreTarget(place.parent)
    if not force and target.size(place.name) is not None:
        raise UserError(f"{place} exists already; --force replaces it")
    return Output(place, force, target)
