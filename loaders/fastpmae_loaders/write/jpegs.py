"""A .beton of coefficients back to one of JPEGs, which every reader of such files takes.

The JPEGs have the same coefficients, and so the same pixels, with the standard's own Huffman tables: what a JPEG had
beside its picture (Exif, comments, tables that suited it better) is not in its code. Images of a mixed file that are no
coefficients keep their bytes.
"""

import os

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG
from fastpmae_loaders.sources.listing import Item, Listing
from fastpmae_loaders.stores.address import Address, place_of
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.check import open_file
from fastpmae_loaders.write.images import StoredImage
from fastpmae_loaders.write.write import (
    MOST_WORKERS,
    PAGE_SIZE,
    TIMEOUT,
    Written,
    check_numbers,
    target_of,
    write_there,
)


@checked
def write_jpegs(
    source: str | os.PathLike[str] | Address,
    out: str | os.PathLike[str] | Address,
    *,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
    page_size: int = PAGE_SIZE,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Written:
    """Writes a .beton of coefficients as one of JPEGs, which appears whole or not at all: `kept` are other images.

    Order, labels, class names and pixels stay as they are, the latter to the bit.

    Raises UserError where `source` holds no coefficients, and what `write_beton` raises.
    """
    place = place_of(out)
    count = workers if workers is not None else min(usable_cores(), MOST_WORKERS)
    check_numbers(count, None, page_size, timeout)
    target = target_of(source, place, force)
    beton = open_file(source)
    if not (beton.mode == COEFFICIENTS).any():
        raise UserError(
            f"{printable(str(source))} holds no coefficients, which --to-jpeg makes JPEGs again: use it as it is"
        )
    path = str(beton.path)
    items = [Item("sample", path, (index,), int(label)) for index, label in enumerate(beton.label)]
    setup = ("fastpmae_loaders.write.jpegs:sample_converter", (path,), count, timeout)
    return write_there(
        place, target, Listing(items, class_names=beton.class_names),
        source, setup, skip_bad, force, max(page_size, beton.page_size), progress or Progress(),
    )  # fmt: skip


def sample_converter(path: str):
    """What a worker process calls for each sample: its image as it is stored from now on."""
    # numba, which the process that starts this one does not need
    from fastpmae_loaders.native.coefficients import is_whole
    from fastpmae_loaders.native.damage import IMPOSSIBLE, damage_of
    from fastpmae_loaders.native.jpeg_writer import to_jpeg

    beton = open_file(path)

    def converted(place: int, item: Item) -> StoredImage:
        (index,) = item.where
        mode, width, height = (int(of[index]) for of in (beton.mode, beton.width, beton.height))
        payload = beton.payload(index).tobytes()
        if mode != COEFFICIENTS:
            return StoredImage(mode, width, height, payload, kept=True)
        jpeg = to_jpeg(payload, height, width) if is_whole(payload) else None
        if jpeg is None:
            raise UserError(damage_of(payload, height, width) or IMPOSSIBLE)
        return StoredImage(JPG, width, height, jpeg, kept=False)

    return converted
