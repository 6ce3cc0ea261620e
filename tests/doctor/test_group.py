"""The sum of a group: exact, and an error where it is not."""

from collections.abc import Iterator

import pytest

from mmearth_ray.doctor.group import Member, bus_rate
from mmearth_ray.errors import DataError

SIZE = 97 * 4 * 10


@pytest.fixture
def member() -> Iterator[Member]:
    alone = Member()
    seat = alone.seat(lambda: "127.0.0.1", gpu=False)
    assert seat.device == "CPU"
    alone.join(0, 1, seat.address, 30)
    yield alone
    alone.leave()


def test_a_sum_that_is_right_is_timed_and_one_that_is_wrong_is_an_error(member: Member) -> None:
    assert 0 < member.reduce(SIZE, times=2) < float("inf")
    member.rank = 1  # gives twice of what is expected of rank 0; a sum is wrong wherever the pattern is not 0
    with pytest.raises(DataError, match="960 of 970 sums over 1 workers are wrong on rank 1"):
        member.reduce(SIZE)


def test_a_gpu_that_torch_does_not_see_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DataError, match="sees no GPU on there; install a build for CUDA"):
        Member().seat(lambda: "there", gpu=True)


def test_a_ring_s_links_carry_twice_all_parts_but_one() -> None:
    assert bus_rate(100, 1.0, 2) == 100
    assert bus_rate(100, 2.0, 4) == 75
