"""The health of an embedding: whether features still tell images apart, or have collapsed.

Shapes: N images, D features.
"""

from dataclasses import asdict, dataclass

import numpy as np

LEAST_RANK = 2.0
"""Effective rank below which features vary along one direction at most.  Encoders that do well are far from all three limits:
measured on 202 tiles of EuroSAT, atto and nano with random weights and atto in the middle of its pretraining have 26 to 54."""

LEAST_STD = 1e-4
"""Deviation below which features do not vary between images; those encoders have 0.3 to 0.6."""

MOST_COSINE = 0.999
"""Mean cosine above which all images look alike; those encoders have 0.17 to 0.46."""

ENOUGH = 16
"""Images from which on the effective rank tells something: that of N images is at most N - 1, whatever the encoder."""


@dataclass(frozen=True)
class Health:
    """What is known of an embedding.

    `effective_rank`: exp of the entropy of the singular values of the centred features, divided by their sum: 1 for one
    direction, D for all alike, 0 where nothing varies (Roy and Vetterli, 2007, "The effective rank").  `feature_std`: the
    deviation of a feature over images, mean over features, in the encoder's own units.  `mean_cosine`: the cosine between the
    features of two images, not centred, mean over all pairs; 1 where all point the same way.  `images`: N.
    """

    effective_rank: float
    feature_std: float
    mean_cosine: float
    images: int

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {name: value for name, value in asdict(self).items() if name != "images"}


def health_of(features_ND: np.ndarray) -> Health:
    """The health of finite features.  Raises ValueError for fewer than two images."""
    images = len(features_ND)
    if features_ND.ndim != 2 or images < 2:
        raise ValueError(f"health is that of features (N, D) of at least 2 images; got {features_ND.shape}")
    features = features_ND.astype(np.float64)
    centred = features - features.mean(0)
    return Health(effective_rank(centred), float(features.std(0).mean()), mean_cosine(features), images)


def effective_rank(centred_ND: np.ndarray) -> float:
    """Of centred features; see `Health`."""
    values = np.linalg.svd(centred_ND, compute_uv=False)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(features_ND: np.ndarray) -> float:
    """Over pairs of different images; see `Health`.  An image without any feature is like no other."""
    norms_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    unit_ND = np.divide(features_ND, norms_N1, out=np.zeros_like(features_ND), where=norms_N1 > 0)
    images, alone = len(unit_ND), float((unit_ND**2).sum())  # of every image with itself
    return float(((unit_ND.sum(0) ** 2).sum() - alone) / (images * (images - 1)))


def collapsed(health: Health) -> str | None:
    """Why an embedding counts as collapsed, None for one that does not."""
    if health.feature_std < LEAST_STD:
        return f"features vary by {health.feature_std:.2g} between images (below {LEAST_STD:g})"
    if health.mean_cosine > MOST_COSINE:
        return f"features of different images have a mean cosine of {health.mean_cosine:.5f} (above {MOST_COSINE:g})"
    if health.images >= ENOUGH and health.effective_rank < LEAST_RANK:
        return f"features have an effective rank of {health.effective_rank:.2f} (below {LEAST_RANK:g})"
    return None
