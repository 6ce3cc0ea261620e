"""The arithmetic of the comparison of loaders: stretches of time, what was spent in them, ratios, rates and bytes."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.loader_clock import Job, Stretch, Taken, box_of, stretch, take
from benchmarks.loader_report import DISK, STORE, Contender, byte_rows, comparable, first_batches, rates, ratios
from benchmarks.loader_watch import Measured, measured


def job(meeting: Path | str = "") -> Job:
    return Job(way="raw", data="s3://bucket/a b", cores=2, image=16, patch=8, batch=4, warm=0.0, seconds=0.05,
               meeting=str(meeting))  # fmt: skip


# ---- the clock ----


def test_a_rate_counts_from_the_batch_that_is_held_when_the_last_consumer_is_warm() -> None:
    early = Taken(0.0, [(1.0, 10), (2.0, 10), (3.0, 10), (5.0, 10), (6.0, 10)])
    late = Taken(1.0, [(3.5, 4), (4.5, 4), (6.5, 4)])
    found = stretch([early, late], warm=0.5)
    assert (found.begin, found.end, found.first) == (4.0, 6.0, 2.5)
    assert found.tiles_per_second == pytest.approx(20 / (6 - 3) + 8 / (6.5 - 3.5))


def test_time_up_to_an_item_without_tiles_does_not_count() -> None:
    found = stretch([Taken(0.0, [(1.0, 8), (2.0, 8), (5.0, 0), (6.0, 8)])], warm=0.0)
    assert found.tiles_per_second == pytest.approx(16 / 2)


def slowly(numbers: Iterator[int]) -> Iterator[int]:
    for number in numbers:
        time.sleep(0.005)
        yield number


def test_a_consumer_goes_on_until_the_others_have_had_enough(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    alone = take(slowly(iter(range(1, 10_000))), job(tmp_path), rank=0, count=2)
    assert alone.came[-1][0] - alone.came[0][0] >= 0.05
    assert (tmp_path / "0").exists()
    assert len(alone.came) < 9_999
    (tmp_path / "1").unlink()
    waiting = take(slowly(iter([7] * 40)), job(tmp_path), rank=0, count=2)
    assert len(waiting.came) == 40, "it stopped without the other"


def test_a_job_survives_its_way_through_a_command_line() -> None:
    assert Job.from_json(job("there").to_json()) == job("there")


def test_boxes_lie_inside_the_tile_and_vary() -> None:
    found = {box_of(str(i), 9) for i in range(200)}
    assert all(0 <= top < 9 and 0 <= left < 9 for top, left in found)
    assert len(found) > 60


# ---- watching ----


def test_what_was_spent_is_that_of_the_time_that_counts() -> None:
    looks = [(0.0, 1.0), (10.0, 2.0), (20.0, 12.0), (30.0, 99.0)]
    found = measured(Stretch(begin=10.0, end=20.0, tiles_per_second=5.0, first=0.3), looks, peak=7)
    assert found == Measured(tiles_per_second=5.0, cpu_per_tile=0.2, peak=7, first=0.3, spilled=False)


# ---- ratios, rates, bytes ----


def a(way: str, compression: str = "zstd", medium: str = DISK) -> Contender:
    return Contender(way, medium, compression)


def m(rate: float, first: float = 1.0, spilled: bool = False, peak: int = 10**9) -> Measured:
    return Measured(rate, 0.002, peak, first, spilled)


def test_ratios_are_medians_of_the_rounds_own() -> None:
    found = {(a("reader"), 1): [m(50), m(10), m(80)], (a("raw"), 1): [m(100), m(10), m(100)]}
    (row,) = ratios("112/16/128", found)
    assert row["compared"] == "our reader / raw pyarrow read"
    assert (row["times as fast"], row["wanted"], row["compression"], row["cores"]) == (0.8, 0.8, "zstd", 1)


def test_what_is_wanted_of_hdf5_depends_on_the_compression() -> None:
    found = {(a("reader", c), 1): [m(100)] for c in ("zstd", "lz4")} | {(a("hdf5", "gzip"), 1): [m(10)]}
    assert [(row["compression"], row["times as fast"], row["wanted"]) for row in ratios("x", found)] == [
        ("zstd", 10, 12.0), ("lz4", 10, 20.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "other", "cores", "expected"),
    [
        (a("reader"), a("raw"), 2, True),
        (a("reader"), a("raw", "lz4"), 2, False),
        (a("reader", medium=STORE), a("raw"), 1, False),
        (a("pipeline"), a("processes"), 1, True),
        (a("reader"), a("litdata", "none"), 1, True),
        (a("reader"), a("litdata", "none"), 2, False),
        (a("torch"), a("litdata", "none"), 2, True),
        (a("torch"), a("litdata", "none"), 1, False),
        (a("raw"), a("reader"), 1, False),
    ],
)
def test_like_is_compared_with_like(mine: Contender, other: Contender, cores: int, expected: bool) -> None:
    assert comparable(mine, other, cores) is expected


def test_rates_are_medians_and_megabytes_those_of_what_the_way_gives() -> None:
    found = {(a("raw"), 1): [m(10), m(30), m(20, peak=3 * 10**9)], (a("reader"), 2): [m(8)]}
    raw, reader = rates("x", found, {"raw": 2_000_000, "": 500_000})
    assert (raw["tiles/s"], raw["MB/s"], raw["CPU ms/tile"], raw["peak GB"]) == (20, 40, 2, 3)
    assert (reader["MB/s"], reader["cores"], reader["from"]) == (4, 2, DISK)


def test_the_first_batch_of_the_pipeline_is_told_and_whether_ray_wrote_to_disk() -> None:
    found = {(a("pipeline"), 1): [m(1, first=3), m(1, first=4, spilled=True)], (a("reader"), 1): [m(1), m(1)]}
    (row,) = first_batches("x", found)
    assert (row["seconds"], row["spilled"]) == (3.5, "yes")


def test_bytes_of_experiments_are_shares_of_the_one_before() -> None:
    rows = byte_rows("x", "zstd", 10, {"all": 80_000, "bands": 40_000, "RGB": 10_000})
    assert [(row["KB/tile"], row["share of the bytes"], row["of"]) for row in rows] == [
        (8, 1, "all"), (4, 0.5, "all"), (1, 0.25, "bands"),
    ]  # fmt: skip
