"""Runs over sets and mixtures: the numbers of one file's run, exact resume, a sentence where other data is given."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpmae import Config, UserError, pretrain, write_beton
from fastpmae.run.log import TIMINGS
from fastpmae_loaders.sources.set_index import SetIndex, shard_of
from fastpmae_loaders.write.sets import write_set
from tests.made import tiny_settings, write_tree


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 images as one file and as a set of three parts; and another file."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "raw", 24)
    write_beton(folder / "raw", folder / "one.beton", workers=1)
    write_set(folder / "raw", folder / "set", 3, workers=1)
    return folder


def config(out: Path, beton: Path | tuple[str, ...], **settings: Any) -> Config:
    return tiny_settings(Path()).using(beton=beton, out=out, epochs=2, workers=1, tensorboard=False, **settings)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


@pytest.mark.slow
def test_a_set_trains_as_one_file_does(data: Path, tmp_path: Path) -> None:
    pretrain(config(tmp_path / "one", data / "one.beton", page_order="off"))
    pretrain(config(tmp_path / "set", data / "set", page_order="off"))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "set")


@pytest.mark.slow
def test_a_mixture_resumes_exactly_and_with_its_own_weights_alone(data: Path, tmp_path: Path) -> None:
    both = (f"{data / 'one.beton'}:0.7", f"{data / 'set'}:0.3")
    pretrain(config(tmp_path / "whole", both))
    pretrain(config(tmp_path / "halves", both, steps=5))
    with pytest.raises(UserError, match="other images"):
        pretrain(config(tmp_path / "halves", (both[0], f"{data / 'set'}:0.9"), resume="auto"))
    pretrain(config(tmp_path / "halves", both, resume="auto"))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "halves")
    kept = json.loads((tmp_path / "whole/config.json").read_text())["data"]
    assert kept["beton"] == list(both)
    assert kept["page_order"] == "on"


def test_a_bad_part_ends_the_run_with_its_name(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "part-0.beton").write_bytes((data / "one.beton").read_bytes())
    shard = shard_of(folder / "part-0.beton")
    (folder / "index.json").write_text(SetIndex((shard,)).to_json())
    (folder / "part-0.beton").unlink()
    with pytest.raises(UserError, match=r"part-0\.beton does not exist"):
        pretrain(config(tmp_path / "run", folder))
