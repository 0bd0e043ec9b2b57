"""What `PairedViews` promises, on every engine of the same bits."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae_loaders import Batch, Beton, PairedViews, PlainViews, UserError, ViewSettings, draw_samples, epoch_order
from fastpmae_loaders.engines import base
from fastpmae_loaders.transfer import Sent, Transfer
from tests.engines import FFCV
from tests.made import REPOSITORY

ENGINES = ["native", FFCV, "torch"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'loaders'}"}
TENSORS = ("simple", "complex", "visible", "folds", "label", "index", "simple_box", "complex_box")
TENSORS += ("simple_flip", "complex_flip", "source_size")


def loader(beton, batch_size=4, engine="torch", **options) -> PairedViews:
    options.setdefault("settings", ViewSettings(image_size=32, patch_size=8, folds=5))
    return PairedViews(beton, batch_size, engine=engine, **options)


def rows(batches) -> dict[int, dict[str, torch.Tensor]]:
    """Every sample's own tensors, by its index."""
    found = {}
    for batch in batches:
        for i in range(len(batch)):
            found[int(batch.index[i])] = {name: getattr(batch, name)[i].clone() for name in TENSORS}
    return found


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i][name], b[i][name]) for i in a for name in TENSORS)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastpmae-loader")]


@pytest.mark.parametrize("engine", ENGINES)
def test_shapes_and_contents(mixed, engine):
    with loader(mixed, 5, engine, seed=3) as views:
        assert len(views) == 4
        batches = list(views)
    assert [len(batch) for batch in batches] == [5] * 4
    beton = Beton(mixed)
    order = epoch_order(3, 0, 23)
    assert torch.cat([batch.index for batch in batches]).tolist() == order[:20].tolist()
    for batch in batches:
        assert isinstance(batch, Batch)
        for view in (batch.simple, batch.complex):
            assert view.dtype == torch.uint8
            assert view.shape == (5, 3, 32, 32)
            assert view.is_contiguous()
        assert batch.visible.shape == (5, 4)
        assert batch.folds.shape == (5, 12)
        assert batch.fold_sizes == (3, 3, 2, 2, 2)
        assert batch.visible.dtype == batch.folds.dtype == batch.index.dtype == batch.label.dtype == torch.int64
        assert (batch.label == batch.index * 10).all()
        assert batch.failed == []
        index = batch.index.numpy()
        drawn = draw_samples(3, 0, index, beton.height[index], beton.width[index], views.settings)
        assert (batch.simple_box.numpy() == drawn.boxes[:, 0]).all()
        assert (batch.complex_box.numpy() == drawn.boxes[:, 1]).all()
        assert (batch.simple_flip.numpy() == drawn.flips[:, 0]).all()
        assert (batch.complex_flip.numpy() == drawn.flips[:, 1]).all()
        assert (torch.cat([batch.visible, batch.folds], 1).numpy() == drawn.order).all()
        assert (batch.source_size.numpy() == np.stack([beton.height, beton.width], 1)[index]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_at_any_threads_and_batch_size(mixed, engine):
    kept = None
    for workers in (1, 2, 3):
        for batch_size in (1, 4, 23):
            with loader(mixed, batch_size, engine, workers=workers, drop_last=False) as views:
                views.set_epoch(2)
                found = rows(views)
            assert len(found) == 23
            assert kept is None or same(found, kept)
            kept = found


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_the_engines_agree(mixed, engine):
    """Bit for bit, raw samples and JPEGs."""
    with loader(mixed, 4, engine, drop_last=False) as a, loader(mixed, 4, "torch", drop_last=False) as b:
        assert same(rows(a), rows(b))


def test_the_first_batch_of_every_epoch_differs(mixed):
    with loader(mixed) as views:
        seen = []
        for epoch in range(3):
            views.set_epoch(epoch)
            seen.append(next(iter(views)).index.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_seeds_differ(mixed):
    with loader(mixed, 23, seed=1, shuffle=False) as a, loader(mixed, 23, seed=2, shuffle=False) as b:
        first, second = next(iter(a)), next(iter(b))
    assert torch.equal(first.index, second.index)
    assert not torch.equal(first.simple, second.simple)
    assert not torch.equal(first.visible, second.visible)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_batch(mixed, engine, drop_last, world_size):
    batch_size = 6 // world_size
    ranks = []
    for rank in range(world_size):
        with loader(mixed, batch_size, engine, rank=rank, world_size=world_size, drop_last=drop_last) as views:
            ranks.append([batch.index.tolist() for batch in views])
            assert len(ranks[-1]) == len(views)
    assert len({len(batches) for batches in ranks}) == 1
    order = epoch_order(0, 0, 23).tolist()
    together = [list(chain.from_iterable(rank[b] for rank in ranks)) for b in range(len(ranks[0]))]
    assert together == [order[b * 6 : b * 6 + 6] for b in range(3 if drop_last else 4)]
    assert max(len(rank[-1]) for rank in ranks) - min(len(rank[-1]) for rank in ranks) <= 1


def test_unshuffled_is_the_files_order(mixed):
    with loader(mixed, 4, shuffle=False, drop_last=False) as views:
        assert torch.cat([batch.index for batch in views]).tolist() == list(range(23))


SOME = [3, 22, 4, 9, 10, 15, 0, 17, 12]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_subset_shows_its_samples_as_the_whole_does(mixed, engine):
    with loader(mixed, 23, engine, seed=4) as views:
        whole = rows(views)
    with loader(mixed, 4, engine, seed=4, indices=SOME, drop_last=False) as views:
        assert (views.count, len(views)) == (9, 3)
        batches = list(views)
        assert torch.cat([batch.index for batch in batches]).tolist() == np.array(SOME)[epoch_order(4, 0, 9)].tolist()
        assert same(rows(batches), {index: whole[index] for index in SOME})
        state = views.state_dict()
    with loader(mixed, 3, engine, seed=4, indices=np.array(SOME), shuffle=False) as views:
        assert torch.cat([batch.index for batch in views]).tolist() == SOME
    with loader(mixed, 4, engine, seed=4) as views, pytest.raises(UserError, match="samples 9, this loader 23"):
        views.load_state_dict(state)


def test_a_subset_by_pages_and_with_repetitions(mixed):
    page_of = Beton(mixed).page_of[SOME]
    with loader(mixed, 4, page_order=True, drop_last=False, indices=SOME) as views:
        found = torch.cat([batch.index for batch in views]).tolist()
    assert found == np.array(SOME)[epoch_order(0, 0, 9, page_of)].tolist()
    with loader(mixed, 5, shuffle=False, indices=torch.tensor([2, 2, 1, 2, 0])) as views:
        assert next(iter(views)).index.tolist() == [2, 2, 1, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "dali"])
def test_only_a_subsets_own_samples_stand_in_for_broken_ones(broken, engine):
    """8 is sound and the next of the file; it may be an image that was kept for validation."""
    if engine == "dali":
        pytest.importorskip("nvidia.nvimgcodec", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")
    some = [399, 5, 6, 300, 2]
    with loader(broken, 5, engine, shuffle=False, indices=some, bad_fraction=1.0) as views:
        batch = next(iter(views))
    assert batch.index.tolist() == [2, 300, 300, 300, 2]
    assert sorted(set(batch.failed)) == [5, 6, 399]
    with (
        loader(broken, 2, engine, indices=[5, 6], bad_fraction=1.0) as views,
        pytest.raises(UserError, match="2 samples in"),
    ):
        next(iter(views))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "whole numbers"),
        ([1.5], "whole numbers"),
        ([[1]], "whole numbers"),
        ([True], "whole"),
        ([3, 23], "sample 23"),
    ],
)
def test_impossible_subsets(wrong, said, mixed):
    with pytest.raises(UserError, match=said):
        loader(mixed, indices=wrong)
    with pytest.raises(UserError, match=said):
        PlainViews(mixed, 4, 32, engine="torch", indices=wrong)


def test_a_subset_for_evaluation(mixed):
    with PlainViews(mixed, 4, 32, engine="torch") as plain:
        whole = torch.cat([images for images, _, _ in plain])
    with PlainViews(mixed, 4, 32, engine="torch", indices=SOME) as plain:
        assert len(plain) == 3
        images, labels, index = (torch.cat(parts) for parts in zip(*plain, strict=True))
    assert index.tolist() == SOME
    assert torch.equal(labels, 10 * index)
    assert torch.equal(images, whole[SOME])


def test_page_order(mixed):
    page_of = Beton(mixed).page_of
    assert len(np.unique(page_of)) > 1
    with loader(mixed, 4, page_order=True, drop_last=False) as views:
        found = torch.cat([batch.index for batch in views]).tolist()
    assert found == epoch_order(0, 0, 23, page_of).tolist()


@pytest.mark.parametrize(("times", "by_page"), [(1.0, True), (1.2, True), (1.3, False), (None, False)])
def test_a_file_that_fills_the_usable_memory_goes_page_by_page(mixed, monkeypatch, times, by_page):
    memory = None if times is None else int(times * Beton(mixed).nbytes)
    monkeypatch.setattr(base, "usable_memory", lambda: memory)
    with loader(mixed, 4) as views:
        assert views.page_order == by_page


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_in_mid_epoch(mixed, engine):
    options = {"engine": engine, "drop_last": False, "seed": 9}
    with loader(mixed, 4, **options) as views:
        views.set_epoch(1)
        straight = rows(views)
    with loader(mixed, 4, **options) as views:
        views.set_epoch(1)
        taken = iter(views)
        before = rows([next(taken), next(taken)])
        state = views.state_dict()
    assert state["epoch"] == 1
    assert state["batch"] == 2
    assert all(type(value) is int for value in state.values())
    with loader(mixed, 4, workers=3, **options) as views:
        views.load_state_dict(state)
        views.set_epoch(1)  # as a training loop does; it must not lose the place
        after = rows(views)
        assert views.state_dict()["batch"] == len(views)
        assert not before.keys() & after.keys()
        assert same({**before, **after}, straight)
        # a new iteration shows the whole epoch, and another epoch begins at its beginning
        assert len(list(views)) == len(views)
        views.set_epoch(2)
        assert views.state_dict()["batch"] == 0


def test_an_iteration_that_was_broken_off_does_not_shorten_the_next(mixed):
    with loader(mixed, 4, drop_last=False) as views:
        whole = [batch.index.tolist() for batch in views]
        for _ in range(2):
            for _batch in views:
                break
            assert views.state_dict()["batch"] == 1
            assert [batch.index.tolist() for batch in views] == whole
        taken = iter(views)
        next(taken)
        views.set_epoch(0)
        assert views.state_dict()["batch"] == 0
        assert [batch.index.tolist() for batch in views] == whole
        # only what was loaded goes on in the middle, once
        views.load_state_dict({**views.state_dict(), "batch": 4})
        # an iteration that was begun before no longer moves the position
        next(taken)
        assert views.state_dict()["batch"] == 4
        assert [batch.index.tolist() for batch in views] == whole[4:]
        assert [batch.index.tolist() for batch in views] == whole


def test_the_position_is_that_of_the_iteration_begun_last(mixed):
    with loader(mixed, 4) as views:
        first = iter(views)
        next(first)
        second = iter(views)
        assert views.state_dict()["batch"] == 0
        for _ in range(3):
            next(first)
        next(second)
        assert views.state_dict()["batch"] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_no_workers_are_one(mixed, engine):
    """A codebase's `--num_workers 0`, with which it is debugged."""
    with loader(mixed, 4, engine, workers=0) as none, loader(mixed, 4, engine, workers=1) as one:
        taken = iter(none)
        next(taken)
        assert len(loader_threads()) == 1
        assert none.workers == 0
        assert same(rows(none), rows(one))
    with PlainViews(mixed, 4, 32, engine=engine, workers=0) as plain:
        assert len(list(plain)) == len(plain)


def test_resume_on_other_ranks(mixed):
    with loader(mixed, 6) as views:
        taken = iter(views)
        next(taken)
        state = views.state_dict()
        rest = next(taken).index.tolist()
    halves = []
    for rank in (0, 1):
        with loader(mixed, 3, rank=rank, world_size=2) as views:
            views.load_state_dict(state)
            halves += next(iter(views)).index.tolist()
    assert halves == rest
    with loader(mixed, 3) as views:
        views.load_state_dict(state)
        assert views.state_dict()["batch"] == 2
    with loader(mixed, 4) as views, pytest.raises(UserError, match="within a global batch"):
        views.load_state_dict(state)
    for name in ("seed", "samples", "shuffle"):
        with loader(mixed, 6) as views, pytest.raises(UserError, match=name):
            views.load_state_dict({**state, name: 77})


def test_a_finished_epoch_resumes_finished(mixed):
    with loader(mixed, 6) as views:
        assert len(list(views)) == 3
        state = views.state_dict()
    with loader(mixed, 6) as views:
        views.load_state_dict(state)
        views.set_epoch(state["epoch"])
        assert list(views) == []


def test_batches_are_numbered(mixed):
    with loader(mixed, 4) as views:
        assert [batch.number for batch in views] == [0, 1, 2, 3, 4]
        views.load_state_dict({**views.state_dict(), "batch": 3})
        assert [batch.number for batch in views] == [3, 4]


def test_positions_count_what_was_taken(mixed):
    with loader(mixed, 2, ahead=5) as views:
        taken = iter(views)
        next(taken)
        time.sleep(0.2)  # the threads are several batches ahead by now
        assert views.state_dict()["batch"] == 1


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_batches_belong_to_the_taker(mixed, engine):
    with loader(mixed, 2, engine) as views:
        taken = iter(views)
        first = next(taken)
        before = hashlib.sha256(first.simple.numpy().tobytes()).hexdigest()
        others = list(taken)
        assert hashlib.sha256(first.simple.numpy().tobytes()).hexdigest() == before
        assert len({batch.simple.data_ptr() for batch in [first, *others]}) == len(others) + 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_broken_images_are_replaced_and_named(broken, engine):
    kept = None
    for workers, batch_size in ((1, 400), (3, 50)):
        with loader(broken, batch_size, engine, workers=workers, shuffle=False, bad_fraction=0.02) as views:
            batches = list(views)
            assert views.failed == [5, 6, 7, 399]
        assert sorted({index for batch in batches for index in batch.failed}) == [5, 6, 7, 399]
        index = torch.cat([batch.index for batch in batches]).tolist()
        assert index == [0, 1, 2, 3, 4, 8, 8, 8, *range(8, 399), 0]
        simple = torch.cat([batch.simple for batch in batches])
        visible = torch.cat([batch.visible for batch in batches])
        # the stand-in comes with draws of its own
        assert torch.equal(simple[5], simple[8])
        assert torch.equal(visible[5], visible[8])
        assert torch.equal(simple[399], simple[0])
        assert torch.cat([batch.label for batch in batches])[5] == 80
        assert kept is None or torch.equal(simple, kept)
        kept = simple


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_broken_images_stop_the_run(broken, engine):
    before = len(loader_threads())
    with loader(broken, 20, engine, bad_fraction=0.009) as views:
        with pytest.raises(UserError, match=r"4 of \d+ samples do not decode.*fastpmae-write --check") as caught:
            list(views)
        assert "399" in str(caught.value)
    assert len(loader_threads()) == before


def test_broken_images_are_a_share_of_the_samples_tried(tmp_path):
    """Each is counted once: stand-ins that were tried too, and no sample again in the next epoch."""
    from tests.loaders.files import write_beton

    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "JPEG")
    bad = write_beton(tmp_path / "some.beton", [b"\xff\xd8 no picture"] * 5 + [image.getvalue()] * 5, [(40, 40)] * 10)
    with (
        loader(bad, 1, shuffle=False, bad_fraction=0.6) as views,
        pytest.raises(UserError, match=r"5 of 6 samples do not decode \(samples 0, 1, 2, 3, 4\), above the"),
    ):
        next(iter(views))
    with loader(bad, 10, shuffle=False, bad_fraction=0.5) as views:
        list(views)
        list(views)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_broken_images(tmp_path, engine):
    from tests.loaders.files import write_beton

    file = write_beton(tmp_path / "bad.beton", [b"\xff\xd8 no picture"] * 6, [(20, 20)] * 6)
    with loader(file, 3, engine, bad_fraction=1.0) as views, pytest.raises(UserError, match="in a row"):
        list(views)


@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_early_leaves_no_thread(mixed, engine):
    torch_threads = torch.get_num_threads()
    before = set(threading.enumerate())
    with loader(mixed, 2, engine, workers=3) as views:
        for _ in range(3):
            for _batch in views:
                break
            assert set(threading.enumerate()) <= before
        held = iter(views)
        next(held)
        assert len(loader_threads()) == 3
        assert torch.get_num_threads() == torch_threads
    assert set(threading.enumerate()) <= before
    assert next(held, None) is None
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize("engine", ENGINES)
def test_two_iterations_at_once(mixed, engine):
    with loader(mixed, 4, engine, workers=2) as views:
        alone = rows(views)
        views.set_epoch(1)
        views.set_epoch(0)
        first, second = [], []
        for a, b in zip(views, views, strict=True):
            first.append(a)
            second.append(b)
        assert same(rows(first), alone)
        assert same(rows(second), alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_loaders_in_two_threads(mixed, engine):
    found, errors = [], []

    def read():
        try:
            with loader(mixed, 4, engine, drop_last=False) as views:
                found.append(rows(views))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert same(found[0], found[1])


def test_a_worker_exception_reaches_the_consumer(mixed):
    before = set(threading.enumerate())
    with loader(mixed, 4) as views:
        fill, calls = views._runner._engine.fill, []

        def fails(job, scratch):
            calls.append(0)
            if len(calls) > 3:
                raise ZeroDivisionError("in a worker")
            return fill(job, scratch)

        views._runner._engine.fill = fails
        with pytest.raises(ZeroDivisionError, match="in a worker"):
            list(views)
        assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_a_forked_child_is_told_that_the_iteration_is_its_parents(mixed):
    """Also where a thread of the parent held the lock when the process was forked."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.programs.forked_iteration", mixed],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "begin a new iteration" in lines[0]
    assert lines[1:] == ["batches 11", "status 0 rest 10"]


def test_an_interrupt_leaves_no_thread(mixed):
    before = set(threading.enumerate())
    with loader(mixed, 2) as views:
        try:
            for _batch in views:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert set(threading.enumerate()) <= before


def test_a_dropped_loader_takes_its_threads_along(mixed):
    before = set(threading.enumerate())
    views = loader(mixed, 2)
    taken = iter(views)
    next(taken)
    del views, taken
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 24}, "make no batch"),
        ({"rank": 1}, "rank 1"),
        ({"workers": -1}, "workers"),
        ({"workers": 257}, "workers"),
        ({"ahead": 0}, "ahead"),
        ({"bad_fraction": 2.0}, "bad_fraction"),
        ({"engine": "jax"}, "engine 'jax'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_that_do_not_fit(mixed, wrong, said):
    with pytest.raises(UserError, match=said):
        loader(mixed, **wrong)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        loader(tmp_path / "none.beton")


def test_moving_a_batch(mixed):
    with loader(mixed) as views:
        batch = next(iter(views))
    moved = batch.to("meta")
    assert moved.simple.device.type == moved.source_size.device.type == "meta"
    assert moved.fold_sizes == batch.fold_sizes
    assert len(moved) == 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[:2])
def test_repeated_epochs_keep_the_memory_flat(mixed, engine):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    with loader(mixed, 4, engine) as views:
        sizes = []
        for epoch in range(60):
            views.set_epoch(epoch)
            for _batch in views:
                pass
            sizes.append(process.memory_info().rss)
    assert sizes[-1] <= sizes[20] * 1.02


def test_samples_by_name(mixed):
    with loader(mixed, 4, drop_last=False) as views:
        views.set_epoch(3)
        everything = rows(views)
        views.set_epoch(4)
        views.set_epoch(3)
        batch = views.batch_of([7, 2, 7])
        assert views.state_dict()["batch"] == 0
        with pytest.raises(UserError, match="no sample 23"):
            views.batch_of([23])
    assert same(rows([batch]), {i: everything[i] for i in (7, 2)})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_at_any_moment(mixed, engine):
    """Two hundred iterations left after some batches, now and then with a pause for the threads to run ahead."""
    rng = np.random.default_rng(0)
    before = set(threading.enumerate())
    with loader(mixed, 3, engine, workers=3) as views:
        for turn in range(200):
            views.set_epoch(turn % 2)
            views.set_epoch(turn)
            taken = iter(views)
            for _ in range(rng.integers(0, 7)):
                next(taken)
            if turn % 20 == 0:
                time.sleep(0.005)
            if turn % 3:
                taken.close()
        del taken
        assert set(threading.enumerate()) <= before


def test_path_or_beton(mixed):
    assert isinstance(mixed, Path)
    with loader(Beton(mixed)) as a, loader(str(mixed)) as b:
        assert torch.equal(next(iter(a)).simple, next(iter(b)).simple)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"device": "cpu"}, False),
        ({"device": "cuda"}, True),
        ({"device": "cuda:1"}, True),
        ({"device": "cuda", "pin_memory": False}, False),
        ({"pin_memory": True}, True),
    ],
    ids=str,
)
def test_pinned_memory_is_asked_for_where_batches_go_to_a_gpu(mixed, options, expected, monkeypatch):
    """And not wherever there is one: a run on the CPU takes none of its memory."""
    asked, real = [], torch.empty

    def empty(*shape, pin_memory=False, **rest) -> torch.Tensor:
        made = real(*shape, **rest)
        if made.numel():
            asked.append(pin_memory)
        return made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Transfer, "send", lambda self, batch, then=None, before=None: Sent(batch, None))
    with loader(mixed, 5, **options) as views:
        next(iter(views))
    assert set(asked) == {expected}
    asked.clear()
    with PlainViews(mixed, 5, image_size=32, engine="torch", pin_memory=expected) as views:
        next(iter(views))
    assert set(asked) == {expected}


def test_a_batchs_labels_are_its_samples(mixed):
    with loader(mixed, 5) as views:
        for batch in views:
            assert batch.label.tolist() == Beton(mixed).label[batch.samples].tolist()


@pytest.mark.slow
def test_a_daemon_thread_begins_nothing_while_the_process_ends(small_beton: Path) -> None:
    """It would be ended within compiled code, which aborts the process."""
    words = [sys.executable, "-m", "tests.programs.daemon_thread", small_beton]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_indices_are_a_tensor_or_an_array_too(mixed: Path, kind: str):
    some = torch.arange(10) if kind == "torch" else np.arange(10)
    with loader(mixed, 5, shuffle=False, indices=some) as views:
        assert torch.cat([batch.index for batch in views]).tolist() == list(range(10))
    with PlainViews(mixed, 5, 32, engine="torch", indices=some) as views:
        assert torch.cat([rows[-1] for rows in views]).tolist() == list(range(10))
    for none in (torch.arange(0), np.arange(0), []):
        with pytest.raises(UserError, match=r"^indices names no sample: give whole numbers"):
            loader(mixed, indices=none)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "must be what state_dict"), ([], "must be what state_dict"), ({}, "must be what state_dict"),
        ({"epoch": 0}, "must be what state_dict"), ({"epoch": 0, "batch": "1"}, "batch is '1'; expected"),
        ({"epoch": 0.5, "batch": 1}, "epoch is 0.5; expected"), ({"epoch": 0, "batch": -1}, "is batch -1"),
        ({"epoch": 0, "batch": 1, "global_batch": 0}, "has global_batch 0"),
    ],
)  # fmt: skip
@pytest.mark.untyped
def test_a_position_that_no_loader_has_saved_is_a_sentence(mixed: Path, state: object, says: str):
    with loader(mixed, 5) as views:
        before = views.state_dict()
        with pytest.raises(UserError, match=f"^the loader's saved position:? {says}"):
            views.load_state_dict(state)  # pyright: ignore[reportArgumentType]
        assert views.state_dict() == before


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_position_among_other_indices_is_a_sentence(mixed: Path, shuffle: bool):
    count = len(Beton(mixed))
    with loader(mixed, 5, shuffle=shuffle, indices=range(10)) as views:
        next(iter(views))
        state = views.state_dict()
    assert json.loads(json.dumps(state)) == state
    for other in (range(1, 11), range(9, -1, -1)):
        with loader(mixed, 5, shuffle=shuffle, indices=other) as views:
            with pytest.raises(UserError, match=r"^the loader's saved position is of other indices= than this loader"):
                views.load_state_dict(state)
            assert views.state_dict()["batch"] == 0
            views.load_state_dict({name: value for name, value in state.items() if name in BEFORE})
            assert views.state_dict()["batch"] == 1
    with loader(mixed, 5, shuffle=shuffle) as views, loader(mixed, 5, shuffle=shuffle, indices=range(count)) as all_:
        all_.load_state_dict(views.state_dict())  # the same images in the same order


BEFORE = ("epoch", "batch", "seed", "samples", "global_batch", "shuffle", "page_order")
"""What a position of an earlier version holds."""


def test_a_position_in_other_images_is_a_sentence(mixed: Path, tmp_path: Path):
    folders = []
    for width in (40, 41):
        folders.append(tmp_path / str(width))
        folders[-1].mkdir()
        for number in range(4):
            Image.new("RGB", (width, 40)).save(folders[-1] / f"{number}.png")
    first, second = (loader(folder, 2) for folder in folders)
    with first, second, loader(folders[0], 2) as again:
        with pytest.raises(UserError, match=r"^the loader's saved position is of other images than this loader's"):
            second.load_state_dict(first.state_dict())
        again.load_state_dict(first.state_dict())


def test_a_position_in_page_order_of_other_pages_is_a_sentence(mixed: Path):
    with loader(mixed, 5, page_order=True) as saved, loader(mixed, 5, page_order=False) as views:
        state = saved.state_dict()
        views.load_state_dict(state)
        assert views.page_order
        state["pages"] ^= 1
        with pytest.raises(UserError, match=r"^the loader's saved position is of a file whose images lie in another"):
            views.load_state_dict(state)


def test_a_gpu_that_is_not_there_is_a_sentence(mixed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device is 'cuda', and torch finds no GPU here: leave device out"):
        loader(mixed, 5, device="cuda")
    with pytest.raises(UserError, match=r"^device is 'cuda:0', and torch finds no GPU here: leave device out"):
        loader(mixed, 5, device=torch.device("cuda:0"))
