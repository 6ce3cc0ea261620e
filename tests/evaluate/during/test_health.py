"""The health of an embedding: numbers of known embeddings, and what counts as a collapse."""

import numpy as np
import pytest

from mmearth_ray.evaluate.during.health import ENOUGH, Health, collapsed, health_of

DRAW = np.random.default_rng


def plain_cosine(features: np.ndarray) -> float:
    """The mean over all pairs, one pair after the other."""
    pairs = [(a, b) for i, a in enumerate(features) for b in features[:i]]
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_counts_directions_that_vary_alike(rank: int) -> None:
    corners = np.concatenate([np.eye(8)[:rank], -np.eye(8)[:rank]])  # centred; their singular values are alike
    assert health_of(corners).effective_rank == pytest.approx(rank)
    turned = corners @ np.linalg.qr(DRAW(0).normal(size=(8, 8)))[0] + 5.0
    assert health_of(turned).effective_rank == pytest.approx(rank)
    assert health_of(1e3 * turned).effective_rank == pytest.approx(rank)


def test_the_effective_rank_is_that_of_the_paper() -> None:
    features = DRAW(0).normal(size=(30, 6)) @ np.diag([9.0, 4, 2, 1, 0.5, 0.1])
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    shares = values / values.sum()
    assert health_of(features).effective_rank == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares)))


def test_deviation_and_cosine_are_those_of_plain_loops() -> None:
    features = DRAW(0).normal(1.0, 2.0, size=(12, 5)).astype(np.float32)
    found = health_of(features)
    assert found.feature_std == pytest.approx(np.mean([np.std(features[:, d]) for d in range(5)]), rel=1e-6)
    assert found.mean_cosine == pytest.approx(plain_cosine(features.astype(np.float64)))
    assert found.images == 12


def test_an_image_without_features_is_like_no_other() -> None:
    assert health_of(np.array([[1.0, 0], [1, 0], [0, 0]])).mean_cosine == pytest.approx(1 / 3)
    nothing = health_of(np.zeros((4, 3)))
    assert (nothing.effective_rank, nothing.feature_std, nothing.mean_cosine) == (0, 0, 0)


def test_a_collapse_is_seen_however_it_comes_about() -> None:
    healthy = DRAW(0).normal(size=(64, 32)) + 1.0
    assert collapsed(health_of(healthy)) is None
    constant = np.ones(32) + 1e-7 * DRAW(0).normal(size=(64, 32))  # its noise alone has a high rank
    assert "vary by 9" in (collapsed(health_of(constant)) or "")
    alike = np.ones(32) + 1e-2 * DRAW(0).normal(size=(64, 32))
    assert "mean cosine of 0.99990 (above 0.999)" in (collapsed(health_of(alike)) or "")
    one_direction = np.outer(DRAW(0).normal(size=64), np.ones(32)) + 1e-4 * DRAW(0).normal(size=(64, 32))
    assert "effective rank of 1.0" in (collapsed(health_of(one_direction)) or "")


def test_few_images_have_no_rank_to_speak_of() -> None:
    assert collapsed(health_of(DRAW(0).normal(size=(3, 32)))) is None
    assert collapsed(Health(1.5, 1.0, 0.0, ENOUGH - 1)) is None
    assert collapsed(Health(1.5, 1.0, 0.0, ENOUGH))


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
def test_health_needs_images_to_compare(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        health_of(np.ones(shape))
