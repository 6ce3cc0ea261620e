"""Where data are missing the gradient is zero: whatever stands there instead, no parameter learns anything of it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_release import at_hidden, convert_release, gradient_of, open_tiny, row_group, samples, step

from mmearth_ray.experiment import Experiment
from mmearth_ray.modalities import Kind, Level, Modality, tasks
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.prepare import Batch
from mmearth_ray.stream.reader import RowGroup
from mmearth_ray.train.loop import to_device

# Raw values that are no data, from the facts of the release and not from the table; the first is what shards usually hold.
NOWHERE = (np.nan, np.inf, -np.inf)
FILLERS: dict[str, tuple[float, ...]] = {
    "sentinel2": (0,),
    "sentinel1": (-np.inf, np.nan, np.inf),
    "aster": (-32768,),
    "era5": NOWHERE,
    "dynamic_world": (0, 10, 77, 255),
    "canopy_height_eth": (127, -128),
    "lat": NOWHERE,
    "lon": NOWHERE,
    "biome": (-1, 14, -7, 32767),
    "eco_region": (-1, 846, -3, -32768),
    "month": NOWHERE,
    "esa_worldcover": (0, 5, 11, 101, 255),
}
UNKNOWN = tuple(f"sentinel1.{orbit}_{polarisation}" for orbit in ("asc", "desc") for polarisation in ("HH", "HV"))
"""Bands without a valid training value, and so without statistics."""
TILES = [4, 5, 7, 8, 10, 11]
ABSENT = 1  # place in TILES of the tile that lacks the layer
TASKS = tasks()
by_task = pytest.mark.parametrize("m", TASKS, ids=[m.name for m in TASKS])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return convert_release(tmp_path_factory.mktemp("fidelity"))


def good(m: Modality, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random values that are data."""
    if m.kind is Kind.CATEGORICAL:
        return rng.choice([c.code for c in m.classes], shape).astype(m.dtype)
    return (rng.integers(1, 100, shape) if m.level is Level.PIXEL else rng.normal(0, 1, shape)).astype(m.dtype)


Fill = Callable[[np.random.Generator, Modality, int], np.ndarray]


def usual(rng: np.random.Generator, m: Modality, count: int) -> np.ndarray:
    return np.full(count, FILLERS[m.name][0])


def any_filler(rng: np.random.Generator, m: Modality, count: int) -> np.ndarray:
    return rng.choice(FILLERS[m.name], count)


def lay(group: RowGroup, m: Modality, fill: Fill, beneath: int, data: int = 0) -> dict[str, np.ndarray]:
    """Write the layer: the same data at the same places for the same `data`, and `fill` where there are none.

    One tile lacks the layer, and what lies there beneath belongs to the number `beneath`; so does what lies in bands without
    statistics.  Returns by column where there are data, bool (n, ...).
    """
    where, hidden, rng = np.random.default_rng(1), np.random.default_rng(beneath), np.random.default_rng(data)
    absent = group.id.index(str(TILES[ABSENT]))
    group.present[m.name][:] = np.arange(len(group.id)) != absent
    valid = {}
    for name in m.columns:
        column = group.columns[name]
        column[:] = good(m, column.shape, rng)
        hole = where.random(column.shape) < 0.3
        if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL:
            hole[group.id.index(str(TILES[0]))], hole[group.id.index(str(TILES[2]))] = True, False
        column[hole] = fill(hidden, m, int(hole.sum())).astype(m.dtype)
        column[absent] = good(m, column[absent].shape, hidden)
        if name in UNKNOWN:
            column[:] = good(m, column.shape, hidden)
        valid[name] = ~hole & (name not in UNKNOWN)
        valid[name][absent] = False
    return valid


def arrange(experiment: Experiment, m: Modality, fill: Fill, beneath: int, data: int = 0) -> tuple[Batch, np.ndarray, bytes]:
    """A batch in which that layer is laid out so, where it holds data (B, C, ...), and the raw bytes."""
    group = row_group(experiment)
    valid = lay(group, m, fill, beneath, data)
    rows = [group.id.index(str(tile)) for tile in TILES]
    raw = b"".join(group.columns[name][rows].tobytes() for name in m.columns)
    return samples(experiment, TILES, group), np.stack([valid[name][rows] for name in m.columns], axis=1), raw


@by_task
def test_no_parameter_learns_from_what_stands_where_data_are_missing(m: Modality, manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch, _, raw = arrange(experiment, m, usual, beneath=2)
    again, _, others = arrange(experiment, m, any_filler, beneath=3)
    assert raw != others, "nothing was perturbed"
    assert np.array_equal(batch["count"], again["count"])
    one, two = step(objective, batch), step(objective, again)
    assert torch.equal(one.loss, two.loss)
    assert one.gradients.keys() == dict(objective.named_parameters()).keys()
    for name, gradient in one.gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, two.gradients[name]), name

    three = step(objective, arrange(experiment, m, usual, beneath=2, data=4)[0])  # the test would notice: data do matter
    heads = [name for name in one.gradients if f"heads.{m.name}." in name]
    assert len(heads) == 2
    for name in heads:
        assert (one.gradients[name] != 0).any(), name
        assert not torch.equal(one.gradients[name], three.gradients[name]), name


@by_task
def test_predictions_have_gradient_exactly_where_there_are_data(m: Modality, manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch, valid, _ = arrange(experiment, m, any_filler, beneath=5)
    found = step(objective, batch)
    expected = at_hidden(valid, batch["hidden"]) if m.level is Level.PIXEL else torch.from_numpy(valid)
    gradient = gradient_of(found.predictions[m.name])
    assert torch.equal(gradient != 0, expected.expand_as(gradient))
    assert 0 < found.counts[m.name] == int(expected.sum()) < expected.numel()
    assert not expected[ABSENT].any()


@by_task
@pytest.mark.parametrize("missing", ["ignored", "mean"])
def test_the_stream_and_the_objective_count_alike(m: Modality, missing: str, manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest, f"model.missing={missing}", "model.normalise_targets=[sentinel2,aster]")
    batch, valid, _ = arrange(experiment, m, any_filler, beneath=6)
    tensors = to_device(batch, torch.device("cpu"))
    assert torch.equal(objective.valid_counts(tensors), torch.from_numpy(batch["count"]))
    everything = m.level is Level.PIXEL and m.kind is Kind.CONTINUOUS and missing == "mean"
    counted = at_hidden(valid | everything, batch["hidden"]) if m.level is Level.PIXEL else torch.from_numpy(valid)
    assert batch["count"][:, TASKS.index(m)].tolist() == counted.flatten(1).sum(1).tolist()


def test_the_facts_of_the_release_name_every_task() -> None:
    assert set(FILLERS) == {m.name for m in TASKS}
