"""The peak that the benchmark of the step measures of a step that takes a tensor of so many floats.

`python -m tests.programs.held_step COUNT`.
"""

import sys
from typing import Any

import torch

from benchmarks import bench_step


class Held:
    def given(self, batch: Any) -> Any:
        return batch

    def losses(self, batch: Any) -> list[float]:
        return [1.0]

    def step(self, batch: Any) -> None:
        torch.ones(int(sys.argv[1]))


if __name__ == "__main__":
    case: Any = Held()
    nothing: Any = None
    print(bench_step.measure(case, nothing, nothing, bench_step.resident("RssAnon"))["peak"])
