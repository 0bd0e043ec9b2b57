"""A loader's saved position, held against the loader that is to continue from it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sampling import check_key
from fastpmae_loaders.values import typed

SAID = "the loader's saved position"


class Position(NamedTuple):
    """An epoch, a batch of this loader's within it, and whether its order goes page by page."""

    epoch: int
    batch: int
    page_order: bool


def position_in(state: Mapping[str, Any], own: Mapping[str, int], pages: Callable[[], int]) -> Position:
    """Where a state says to continue.

    Args:
        state: of a loader of any number of ranks; what one of an earlier version lacks is not asked for.
        own: the state of the loader that is to continue.
        pages: the digest of its pages.

    Raises:
        UserError: where the state is of other data, another seed or order, or falls within a batch.
    """
    if not isinstance(state, Mapping) or not {"epoch", "batch"} <= state.keys():
        raise UserError(f"{SAID} must be what state_dict() gave, with an epoch and a batch")
    state = {name: typed(state[name], bool | int, f"{SAID}: {name}") for name in own.keys() & state.keys()}
    if state.get("global_batch", 1) < 1:
        raise UserError(f"{SAID} has global_batch {state['global_batch']}")
    for name in ("seed", "samples", "shuffle"):
        if state.get(name, own[name]) != own[name]:
            raise UserError(f"{SAID} has {name} {state[name]}, this loader {own[name]}")
    by_page = bool(state.get("page_order", own["page_order"]))
    for name, ours, other in (
        ("images", own["images"], "of other images than this loader's, though as many: name its own"),
        ("indices", own["indices"], "of other indices= than this loader's, though as many: give those again"),
        ("pages", pages() if by_page and own["shuffle"] else 0, "of a file whose images lie in another order on "
         "the disk, which page order follows: name the file it was saved with"),
    ):  # fmt: skip
        if state.get(name, ours) != ours:
            raise UserError(f"{SAID} is {other}; set_epoch() begins an epoch anew")
    check_key(own["seed"], state["epoch"])
    if state["batch"] < 0:
        raise UserError(f"{SAID} is batch {state['batch']}")
    place = state["batch"] * state.get("global_batch", own["global_batch"])
    batch, rest = divmod(place, own["global_batch"])
    if rest:
        raise UserError(
            f"the saved position is sample {place} of its epoch, within a global batch of {own['global_batch']}; "
            "resume with a batch size that divides it"
        )
    return Position(state["epoch"], batch, by_page)
