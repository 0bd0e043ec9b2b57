"""`bench_sets`: its made-up index and hollow file open as real ones do, and all ways of opening give one order."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_sets import (
    listed_folder,
    made_index,
    opened_file,
    opened_list,
    opened_set,
    page_rows,
    write_folder,
    write_hollow,
)
from fastpmae_loaders import Beton


def test_all_ways_give_one_order(tmp_path: Path):
    index, file = tmp_path / "index.json", tmp_path / "hollow.beton"
    index.write_text(made_index(10_000))
    write_hollow(file, 10_000)
    assert len(Beton(file)) == 10_000
    listed = opened_list(str(file))(0, 10_000)
    assert sorted(listed.tolist()) == list(range(10_000))
    assert (opened_file(str(file))(0, 10_000) == listed).all()
    assert (opened_set(str(index))(0, 10_000) == listed).all()


def test_a_folder_is_listed_as_a_whole(tmp_path: Path):
    write_folder(tmp_path / "folder", 2300)
    assert (listed_folder(str(tmp_path / "folder"))(0, 2300) == np.arange(2300)).all()


@pytest.mark.parametrize("nodes", [8, 32])
def test_dealing_pages_reads_fewer(nodes: int):
    values = {row.case: row.value for row in page_rows(200_000)}
    assert values[f"{nodes} nodes, pages dealt out"] < 0.5 * values[f"{nodes} nodes, dealt by places"]
    assert all(np.isfinite(value) and value >= 0.9 for value in values.values())
