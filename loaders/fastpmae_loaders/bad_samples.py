"""Samples that do not decode: remembered, and counted until they are too many."""

from collections.abc import Callable

import numpy as np

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Samples, advice, check_whole
from fastpmae_loaders.errors import UserError

FEW = 4
"""So many different samples must fail before their share counts: one bad image in a small file stops nothing."""


class BadSamples:
    """What of a loader's samples did not decode so far.

    Args:
        samples: all that there are.
        count: how many of them are shown.
        fraction: above this share of those tried, each counted once, the iteration stops.
        after: the sample that stands in for one.
    """

    def __init__(self, samples: Samples, count: int, fraction: float, after: Callable[[int], int]) -> None:
        self._samples, self._count, self._fraction, self._after = samples, count, fraction, after
        self._tried = np.zeros(-(-len(samples) // 8), np.uint8)  # a bit each
        self._tried_count = 0
        self._failed: dict[int, None] = {}

    @property
    def failed(self) -> list[int]:
        """Each once, in the order in which they were met."""
        return list(self._failed)

    def account(self, job: Job) -> list[int]:
        """The samples of a job that did not decode.

        Raises:
            UserError: when they are too many, or nothing was found to stand in for one.
        """
        samples, wanted, shown = self._samples, job.indices, job.rows.index
        failed: list[int] = []
        wrong = np.flatnonzero(wanted != shown)
        if len(wrong):
            check_whole(samples)
        for row in wrong:
            index = int(wanted[row])
            if shown[row] < 0:
                check_whole(samples, unchanged=True)
                raise UserError(
                    f"{samples.path}: {min(ATTEMPTS, self._count)} samples in a row, from {index} on, do not "
                    f"decode; {advice(samples, index)}"
                )
            while index != shown[row]:
                failed.append(index)
                index = self._after(index)
        self._note(np.concatenate([wanted, shown, np.asarray(failed, np.int64)]))
        self._failed.update(dict.fromkeys(failed))
        tried = self._tried_count
        if len(self._failed) >= FEW and len(self._failed) > self._fraction * tried:
            check_whole(samples, unchanged=True)
            first = ", ".join(map(str, self.failed[:10])) + (", ..." if len(self._failed) > 10 else "")
            raise UserError(
                f"{samples.path}: {len(self._failed)} of {tried} samples do not decode (samples {first}), "
                f"above the limit of {self._fraction:.3g}; {advice(samples, self.failed[0])}, or raise bad_fraction"
            )
        return failed

    def _note(self, tried: np.ndarray) -> None:
        """Count samples that have been tried, each once: by the bits that are new, whatever number there is of all."""
        numbers = np.unique(tried)
        place, bit = numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8)
        self._tried_count += int(np.count_nonzero(self._tried[place] & bit == 0))
        np.bitwise_or.at(self._tried, place, bit)
