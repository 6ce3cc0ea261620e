"""Randomness by name: known answers, an independent Philox, permutations, no memory of what was drawn before."""

import hashlib

import numpy as np
import pytest

from mmearth_ray.stream.draws import permutation, words

MASK = 2**64 - 1


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox 4x64 with ten rounds (Salmon et al., 2011, section 4), counting blocks from 1 as numpy does."""
    found: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        c, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(second >> 64) ^ c[1] ^ k[0], second & MASK, (first >> 64) ^ c[3] ^ k[1], first & MASK]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        found += c
    return found[:count]


def test_words_are_known() -> None:
    assert words(3, "a", 1).tolist() == [10267112094221570523, 7363020308196302738, 3601733058605731746]
    assert words(3, "sample", 0, 0, "tiny", "0").tolist() == [
        17646753279333306518, 11544081294149813050, 6682103781471701153,
    ]  # fmt: skip
    assert permutation(8, "order", 0, 0).tolist() == [2, 1, 6, 5, 7, 4, 0, 3]


@pytest.mark.parametrize("names", [("a", 1), ("sample", 7, 3, "tiny", "42"), ("å",)])
def test_words_are_those_of_philox_keyed_with_a_hash_of_the_names(names: tuple[object, ...]) -> None:
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=16).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    assert words(11, *names).tolist() == philox(key, 11)


def test_words_depend_on_all_names_and_on_nothing_drawn_before() -> None:
    first = words(5, "sample", 0, 1, "set", "7").tolist()
    for names in [("sample", 1, 1, "set", "7"), ("sample", 0, 2, "set", "7"), ("sample", 0, 1, "tes", "7"),
                  ("sample", 0, 1, "set", "8"), ("sample", 0, 1, "set7"), ("sample", 0, "1set", "7")]:  # fmt: skip
        assert words(5, *names).tolist() != first
    np.random.default_rng(3).random(100)
    assert words(5, "sample", 0, 1, "set", "7").tolist() == first
    assert words(2, "sample", 0, 1, "set", "7").tolist() == first[:2]
    assert words(5, "sample", 0, 1, "set", "7").dtype == np.uint64


@pytest.mark.parametrize("length", [1, 2, 7, 49, 1000])
def test_a_permutation_holds_every_number_once(length: int) -> None:
    for epoch in range(5):
        assert sorted(permutation(length, "order", 0, epoch).tolist()) == list(range(length))


def test_every_order_of_three_comes_up_about_equally_often() -> None:
    orders = [tuple(permutation(3, "order", seed, 0).tolist()) for seed in range(6000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts)  # five standard deviations
