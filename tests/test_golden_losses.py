"""Twenty losses of every method, as they were when they were kept: a change of code that means none changes none."""

import pytest

from fastpmae import PRESETS
from tests.golden.losses import CASES, FOLDER, LOSSES, STEPS, differences, kept, path_of, run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_that_were_kept(case: str):
    """Other processors round otherwise; `python -m tests.golden` compares to the bit."""
    found, before = run(case)["figures"], kept(case)["figures"]
    losses = [name for name in LOSSES if name in before]
    assert losses == [name for name in LOSSES if name in found]  # a method without labels has none of theirs
    for name in losses:
        assert len(before[name]) == STEPS
        assert found[name] == pytest.approx(before[name], rel=1e-5, abs=1e-12), name


def test_every_method_has_its_losses_and_nothing_else_is_kept():
    # paper-800 and ablation are paper and dual by another length, and small-data goes from mae to sdae
    assert {preset for preset, _ in CASES.values()} == set(PRESETS) - {"paper-800", "ablation", "small-data"}
    assert set(FOLDER.glob("*.json")) == {path_of(case) for case in CASES}


def test_a_difference_in_the_last_bit_is_told():
    found = kept("mae")
    assert differences("mae", found) == []
    figures = found["figures"]
    figures["loss"][6] += 2e-16 * figures["loss"][6]
    del figures["lr"]
    figures["more"] = [0.0] * STEPS
    found["weights"]["of the seed"] = "others"
    told = "\n".join(differences("mae", found))
    parts = ("mae: lr is gone", "mae: loss differs from step 7 on", "mae: more is new", "weights of the seed differ")
    assert all(part in told for part in parts), told
    assert told.count("\n") == 3, told
