"""Who is in which split or fold, where a data set does not say: balanced over what is asked, neighbours together.

Shapes: N images, U units of images that stay together.
"""

import hashlib

import numpy as np

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import SPLITS

EARTH_KM = 6371.0
"""Mean radius of the Earth (IUGG)."""


def blocks_of(latitude_N: np.ndarray, longitude_N: np.ndarray, degrees: float) -> np.ndarray:
    """int64 (N, 2) block of each place: cells of so many degrees, counted from south and from west."""
    return np.floor(np.stack([latitude_N + 90, longitude_N + 180], axis=1) / degrees).astype(np.int64)


def splits_by_block(block_N2: np.ndarray, valid: float, test: float, seed: int) -> np.ndarray:
    """(N,) name of each image's split: a hash of (seed, block) decides, so that a block is in one split, whatever the others.

    It is another hash than that of a release's hold-out, whose blocks would else all be in test.
    """
    cells_U2, unit_N = np.unique(block_N2, axis=0, return_inverse=True)
    texts = [f"labelled task/{seed}/{south}/{west}" for south, west in cells_U2.tolist()]
    share_U = np.array([int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64 for text in texts])
    place_U = np.where(share_U < test, 2, np.where(share_U < test + valid, 1, 0)).astype(np.int64)
    return np.array(SPLITS, dtype=object)[place_U[unit_N.reshape(-1)]]


def km_to_nearest(latitude_N: np.ndarray, longitude_N: np.ndarray, others_M2: np.ndarray) -> np.ndarray:
    """(N,) km of each place to the nearest of others (latitude, longitude in degrees); infinite where there are none."""
    from sklearn.neighbors import BallTree

    if not len(others_M2) or not len(latitude_N):
        return np.full(len(latitude_N), np.inf)
    tree = BallTree(np.radians(others_M2), metric="haversine")
    return tree.query(np.radians(np.stack([latitude_N, longitude_N], axis=1)), k=1)[0][:, 0] * EARTH_KM


def neighbours(latitude_N: np.ndarray, longitude_N: np.ndarray, km: float) -> np.ndarray:
    """(N,) unit of each image: those that a chain of steps shorter than `km` joins are in one.

    Images whose place is unknown (NaN) are units of their own; so are all where `km` is 0.
    """
    from sklearn.cluster import DBSCAN

    unit_N = np.arange(len(latitude_N))
    known = np.flatnonzero(np.isfinite(latitude_N) & np.isfinite(longitude_N))
    if km and len(known):
        radians = np.radians(np.stack([latitude_N[known], longitude_N[known]], axis=1).astype(np.float64))
        found = DBSCAN(eps=km / EARTH_KM, min_samples=1, metric="haversine", algorithm="ball_tree").fit(radians).labels_
        first = np.unique(found, return_index=True)[1]
        unit_N[known] = known[first[found]]
    return unit_N


def strata_of(values_N: np.ndarray, bins: int = 5) -> np.ndarray:
    """(N,) stratum of each image: its class, its row of labels, or of numbers the fifth of them that it is in."""
    if values_N.ndim == 1 and values_N.dtype.kind == "f":
        return np.searchsorted(np.quantile(values_N, np.arange(1, bins) / bins), values_N, "right")
    return np.unique(values_N, axis=0, return_inverse=True)[1].reshape(-1)


def check_shares(folds: int, valid: float, test: float) -> None:
    """Raise UsageError for folds or shares that leave no training images."""
    if folds == 1:
        raise UsageError("folds=1 leaves nothing to train on; use at least 2, or 0 for one split")
    if not folds and valid + test >= 1:
        raise UsageError(f"valid={valid:g} and test={test:g} leave nothing to train on; together they must be below 1")


def assigned(
    stratum_N: np.ndarray, unit_N: np.ndarray, folds: int, valid: float, test: float, seed: int
) -> tuple[list[str], np.ndarray]:
    """Split of each image ("" with folds), and fold of each (-1 without)."""
    if folds:
        return [""] * len(stratum_N), folds_of(stratum_N, unit_N, folds, seed)
    return splits_of(stratum_N, unit_N, valid, test, seed).tolist(), np.full(len(stratum_N), -1)


def folds_of(stratum_N: np.ndarray, unit_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) fold of each image: those of a stratum spread evenly over folds, those of a unit in one.

    Largest units first, each into the fold with the fewest of its strata, then the fewest images; ties by the seed's order.
    """
    return _shares(stratum_N, unit_N, np.full(folds, 1 / folds), seed)


def splits_of(stratum_N: np.ndarray, unit_N: np.ndarray, valid: float, test: float, seed: int) -> np.ndarray:
    """(N,) name of each image's split, by shares of the images, in the same way."""
    return np.array(SPLITS, dtype=object)[_shares(stratum_N, unit_N, np.array([1 - valid - test, valid, test]), seed)]


def _shares(stratum_N: np.ndarray, unit_N: np.ndarray, share_S: np.ndarray, seed: int) -> np.ndarray:
    """(N,) part of each image, parts being of those shares of every stratum as far as units allow."""
    rng = np.random.default_rng([seed, 20])
    names_U, unit_N, size_U = np.unique(unit_N, return_inverse=True, return_counts=True)
    stratum_N = _joined(stratum_N, 1 / share_S[share_S > 0].min())
    content_UK = np.zeros((len(names_U), int(stratum_N.max(initial=0)) + 1))
    np.add.at(content_UK, (unit_N.reshape(-1), stratum_N), 1)
    owed_SK, owed_S = np.outer(share_S, content_UK.sum(0)), share_S * len(stratum_N)
    part_U = np.zeros(len(names_U), np.int64)
    turn_U = rng.permutation(len(names_U))
    for unit in turn_U[np.argsort(-size_U[turn_U], kind="stable")]:
        want_S = owed_SK @ content_UK[unit] / size_U[unit]
        # what a stratum is owed decides; where parts are owed the same of it, what they are owed in all
        order = np.lexsort((rng.random(len(share_S)), -owed_S, -np.round(want_S, 9)))
        part = order[share_S[order] > 0][0]
        part_U[unit] = part
        owed_SK[part] -= content_UK[unit]
        owed_S[part] -= size_U[unit]
    return part_U[unit_N.reshape(-1)]


def _joined(stratum_N: np.ndarray, least: float) -> np.ndarray:
    """The strata with those of fewer images than `least` as one: no part is owed a whole image of them."""
    _, stratum_N, count_K = np.unique(stratum_N, return_inverse=True, return_counts=True)
    return np.where(count_K[stratum_N] < least - 1e-9, len(count_K), stratum_N)
