from dataclasses import replace

import numpy as np
import pytest

from fastpmae.plan.gpus import GPUS, gpu_named
from fastpmae.plan.scaling import (
    LINKS_REACH,
    Step,
    all_reduce,
    buckets,
    counts,
    fsdp_messages,
    step_on,
    strong_scaling,
    traffic,
    weak_scaling,
    where_it_ends,
)

H100 = GPUS["h100"]
MESSAGES = traffic(120_000_000, 8192, 3)
STEP = Step(0.264, [(0.010, 8_400_000), (0.048, 26_000_000), (0.038, 85_600_000)], MESSAGES)


def test_one_gpu_says_nothing():
    assert all_reduce(1e9, 1, H100) == 0
    point = step_on(1, H100, STEP)
    assert (point.gradients, point.assignments, point.slowest) == (0, 0, 0)
    assert point.seconds == STEP.compute
    assert MESSAGES.sent(1) == 0


@pytest.mark.parametrize(("gpus", "rate"), [(8, H100.link), (16, H100.network), (1024, H100.network)])
def test_large_messages_go_at_the_narrowest_link(gpus: int, rate: float):
    # a ring sends each byte twice around but for a part; beyond some gigabytes no latency counts
    least = 2 * (gpus - 1) / gpus * 64e9 / (LINKS_REACH * rate)
    assert least <= all_reduce(64e9, gpus, H100) <= 1.05 * least


def test_small_messages_wait_for_hops_alone():
    few, many = all_reduce(4, 8, H100), all_reduce(4, 1024, H100)
    assert 1e-6 < few < many < 200e-6
    # a tree over 128 machines has 7 storeys, up and down, and each costs at least 5 us
    assert many > 2 * 7 * 5e-6
    assert all_reduce(4, 1024, replace(H100, link=1e15, network=1e15)) == pytest.approx(many, rel=0.01)


def test_more_bytes_or_gpus_take_no_less():
    for gpu in GPUS.values():
        times = np.array([[all_reduce(nbytes, gpus, gpu) for nbytes in np.logspace(0, 9, 19)] for gpus in counts(1024)])
        assert (np.diff(times, axis=0) >= 0).all()
        assert (np.diff(times, axis=1) >= 0).all()


def test_buckets_hold_every_gradient_as_soon_as_it_is_there():
    full = buckets(STEP.backward)
    assert sum(nbytes for _, nbytes in full) == pytest.approx(4 * 120_000_000)
    moments = [moment for moment, _ in full]
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(0.096)
    assert full[0][1] == 2**20
    assert all(nbytes == 25 * 2**20 for _, nbytes in full[1:-1])
    # 33.6 MB of the head come first: one bucket of 1 MiB, one of 25 MiB, and the next is not full before the decoder's
    assert sum(moment <= 0.010 for moment in moments) == 2


def test_gradients_hide_behind_the_backward_pass():
    point = step_on(8, H100, STEP, jitter=0.0)
    last = buckets(STEP.backward)[-1][1]
    assert point.gradients == pytest.approx(all_reduce(last, 8, H100))
    slow = step_on(8, replace(H100, link=1e9), STEP, jitter=0.0)
    everything = sum(all_reduce(nbytes, 8, replace(H100, link=1e9)) for _, nbytes in buckets(STEP.backward))
    assert everything - 0.096 < slow.gradients < everything


def test_waiting_for_the_slowest_is_the_mean_of_the_largest():
    drawn = np.random.default_rng(0).normal(1.0, 0.02, (4000, 256)).max(1).mean() - 1
    step = Step(1.0, [], traffic(0, 0, 3))
    assert step_on(256, H100, step, jitter=0.02).slowest == pytest.approx(drawn, rel=0.03)


def test_growth_and_where_it_ends():
    points = weak_scaling(H100, STEP)
    assert [point.gpus for point in points] == [2**power for power in range(11)]
    efficiencies = [point.efficiency for point in points]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert where_it_ends(points) is None

    slow = weak_scaling(replace(H100, network=1e9), STEP)
    end = where_it_ends(slow)
    assert end is not None
    assert (end.gpus, end.loss) == (16, "gradients")
    assert where_it_ends(weak_scaling(H100, STEP, jitter=0.05)).loss == "slowest"  # pyright: ignore

    strong = strong_scaling(H100, STEP, 768)
    assert [point.gpus for point in strong][-1] == 512
    assert all(s.efficiency <= w.efficiency + 1e-12 for s, w in zip(strong, points, strict=False))
    assert strong[3].compute == STEP.compute / 8


def test_messages_of_a_step():
    assert MESSAGES.gradients == 480_000_000
    # the maxima, then three sums, for both matrices of prototypes at once
    assert MESSAGES.assignments == [32768] * 4
    assert len(traffic(1, 8192, 3, micro_batches=2).assignments) == 8
    # in two rounds each matrix has messages of its own
    assert traffic(120_000_000, 8192, 3, rounds=2).assignments == [16384] * 8
    assert traffic(1, 0, 3).assignments == []
    assert MESSAGES.sent(2) == 480_000_000 + 4 * 32768 + 4


def test_messages_of_a_sharded_step():
    # a teacher of two blocks, and a student of two and one: gathered for both directions, then taken apart
    student, teachers = [(200, 2), (50, 1)], [(200, 2)]
    shards = fsdp_messages(student, teachers, 1)
    assert shards == [400, 400, *[400, 400, 200], *[200, 200, 400, 400, 400, 400]]
    assert len(fsdp_messages(student, teachers, 3)) == 3 * len(shards)
    messages = traffic(250, 0, 3, fsdp=shards)
    assert messages.sent(4) == 3 / 4 * (4 * (200 + 3 * 250) + 2 * 4)
    # FSDP sends the student's bytes three times where DDP sends them twice
    assert traffic(250, 0, 3, fsdp=fsdp_messages(student, [], 1)).sent(4) == pytest.approx(3 / 4 * (3000 + 8))
    step = replace(STEP, messages=replace(MESSAGES, fsdp=fsdp_messages([(120_000_000, 12)], [], 1)))
    fast, slow = (step_on(8, replace(H100, link=link), step, jitter=0.0).gradients for link in (H100.link, 1e9))
    assert fast == pytest.approx(all_reduce(40e6, 8, H100))
    assert slow > STEP.compute


def test_gpus_are_plausible():
    for name, gpu in GPUS.items():
        assert gpu_named(name.upper()) is gpu
        assert gpu.source
        assert 1 < gpu.bf16 / gpu.fp32 < 40
        assert 0.2e12 < gpu.bandwidth < 10e12
        assert gpu.link < gpu.bandwidth
        assert 20 < gpu.usable / 2**30 < gpu.gib
