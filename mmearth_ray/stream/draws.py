"""Randomness by name: every random number is a pure function of what it is for, never of what was drawn before.

A counter-based generator (Philox, Salmon et al., 2011) is keyed with a hash of the names, so that a sample's crop and mask
are the same on any worker, in any order, after any restart.  Only raw 64-bit words are used: numpy keeps those stable
across versions, which it does not promise for its distributions (NEP 19).
"""

import hashlib

import numpy as np


def words(count: int, *names: object) -> np.ndarray:
    """uint64 (count,): random words that belong to these names."""
    text = "\x1f".join(map(str, names)).encode()
    key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def permutation(length: int, *names: object) -> np.ndarray:
    """int64 (length,): the numbers 0..length-1 in an order that belongs to these names."""
    return np.argsort(words(length, *names), kind="stable")
