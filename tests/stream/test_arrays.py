"""Arrays whose memory is used again: never while anything still refers to it."""

import numpy as np
import pytest
import torch

from mmearth_ray.stream import arrays

SHAPE = (700, 1000)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_blocks", {})


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_the_array_is_gone() -> None:
    first = arrays.empty(SHAPE, np.uint8)
    at = address(first)
    del first
    assert address(arrays.empty(SHAPE, np.uint8)) == at
    assert address(arrays.empty((350, 1000), np.int16)) == at


@pytest.mark.parametrize("hold", [
    lambda a: a, lambda a: a[5:, ::2], lambda a: a.reshape(-1).view(np.uint16), torch.from_numpy, memoryview, lambda a: [a[0]],
])  # fmt: skip
def test_memory_is_not_used_again_while_anything_refers_to_it(hold: object) -> None:
    first = arrays.empty(SHAPE, np.uint8)
    at = address(first)
    first[:] = 7
    held = hold(first)  # type: ignore[operator]
    del first
    second = arrays.empty(SHAPE, np.uint8)
    second[:] = 9
    assert address(second) != at
    part = held[0] if isinstance(held, list) else held
    assert np.asarray(part).reshape(-1).view(np.uint8)[0] == 7
    del held, part
    assert at in {address(arrays.empty(SHAPE, np.uint8))}


def test_arrays_have_the_shape_and_type_that_were_asked_for() -> None:
    for shape, dtype in [((3, 5), np.int64), ((40, 50, 60), np.float32), ((1 << 20,), bool), ((0, 4), np.uint8)]:
        found = arrays.empty(shape, dtype)
        assert found.shape == shape
        assert found.dtype == dtype
        assert found.flags.c_contiguous
        assert found.flags.writeable


def test_a_process_keeps_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LIMIT", 3_000_000)
    held = [arrays.empty(SHAPE, np.uint8) for _ in range(8)]
    assert len({address(a) for a in held}) == 8
    kept = sum(size * len(blocks) for size, blocks in arrays._blocks.items())
    assert 2_000_000 < kept <= 3_000_000


def test_few_different_sizes_occur() -> None:
    sizes = {arrays._rounded(size) for size in range(1 << 20, 1 << 21, 999)}
    assert len(sizes) <= 5
    assert all(size <= arrays._rounded(size) <= 1.25 * size for size in range(1 << 17, 1 << 19, 777))
