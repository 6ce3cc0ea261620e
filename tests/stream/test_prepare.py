"""Preparing samples: one box for all maps, masks that partition, labels by table, counts by an independent loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmearth_ray.modalities import TABLE, Kind, Level, Modality, get, tasks
from mmearth_ray.model.mpmae import build_mpmae
from mmearth_ray.objective import Objective
from mmearth_ray.stream.prepare import Batch, Piece, SampleSpec, assemble, draw, elements, valid_mask
from mmearth_ray.stream.reader import RowGroup
from mmearth_ray.train.loop import to_device

TILE, IMAGE, PATCH, VISIBLE = 30, 24, 8, 4
ALL = (*tasks(), get("sentinel2_scl"))  # every level and kind that can be trained on


def make_spec(**changes: object) -> SampleSpec:
    spec = SampleSpec(3, IMAGE, PATCH, VISIBLE, input=get("sentinel2").default_bands(), targets=ALL)
    return replace(spec, **changes)  # type: ignore[arg-type]


def make_group(tiles: int, seed: int = 0, valid_share: float = 0.7, absent: tuple[str, ...] = ()) -> RowGroup:
    """Random raw values of all rows of the table, of which about `valid_share` are data."""
    rng = np.random.default_rng(seed)
    columns, present = {}, {}
    for m in TABLE:
        shape = (tiles, TILE, TILE) if m.level is Level.PIXEL else (tiles,)
        fillers = list(m.missing) or [np.nan if m.dtype == "float32" else -1]
        for name in m.columns:
            codes = [c.code for c in m.classes] if m.kind is Kind.CATEGORICAL else np.arange(1, 100)
            data = rng.choice(codes, shape)
            columns[name] = np.where(rng.random(shape) < valid_share, data, rng.choice(fillers, shape)).astype(m.dtype)
        present[m.name] = np.zeros(tiles, bool) if m.name in absent else rng.random(tiles) < 0.8
    return RowGroup([f"t{i}" for i in range(tiles)], (np.arange(tiles) % 2).astype(np.int8), columns, present, TILE)


def prepare(spec: SampleSpec, group: RowGroup, rows: np.ndarray, epoch: int) -> Batch:
    return assemble(spec, [Piece(group, rows, epoch, "set")])


def box(spec: SampleSpec, tile: str, epoch: int) -> tuple[slice, slice]:
    top, left, _, _ = draw(spec, [tile], epoch, "set", TILE)
    return slice(top[0], top[0] + spec.image_size), slice(left[0], left[0] + spec.image_size)


def test_all_maps_of_a_sample_share_one_box_and_boxes_differ_between_samples() -> None:
    spec, group = make_spec(), make_group(40)
    place = np.arange(TILE * TILE).reshape(TILE, TILE)
    for m in spec.targets:
        for name in m.columns if m.level is Level.PIXEL and m.kind is Kind.CONTINUOUS else ():
            group.columns[name][:] = place.astype(m.dtype)  # in int8 the place modulo 256: still one box only
    batch = prepare(spec, group, np.arange(40), epoch=1)
    boxes = set()
    for i, tile in enumerate(group.id):
        top, left = divmod(int(batch["sentinel2"][i, 0, 0, 0]), TILE)
        boxes.add((top, left))
        assert 0 <= top <= TILE - IMAGE
        assert 0 <= left <= TILE - IMAGE
        rows, columns = slice(top, top + IMAGE), slice(left, left + IMAGE)
        assert (rows, columns) == box(spec, tile, 1)
        for m in spec.targets:
            if m.level is Level.PIXEL and m.kind is Kind.CONTINUOUS:
                expected = place[rows, columns].astype(m.dtype)
                assert all(np.array_equal(band, expected) for band in batch[m.name][i])
            elif m.level is Level.PIXEL and group.present[m.name][i]:
                codes = group.columns[m.columns[0]][i, rows, columns]
                assert np.array_equal(batch[m.name][i], m.label_table()[codes])
    assert len(boxes) > 15


def test_every_offset_of_the_crop_occurs() -> None:
    top, left, _, _ = draw(make_spec(), [str(i) for i in range(400)], 0, "set", TILE)
    room = TILE - IMAGE + 1
    assert set(top.tolist()) == set(left.tolist()) == set(range(room))
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) == room * room


def test_box_and_mask_depend_on_seed_epoch_data_set_and_id_alone() -> None:
    def drawn(spec: SampleSpec, ids: list[str], epoch: int, dataset: str = "set") -> list[list[int]]:
        parts = draw(spec, ids, epoch, dataset, TILE)
        return [np.concatenate([np.atleast_1d(part[i]) for part in parts]).tolist() for i in range(len(ids))]

    spec = make_spec()
    ids = [f"t{i}" for i in range(30)]
    first = drawn(spec, ids, 2)
    assert drawn(spec, ids[::-1], 2) == first[::-1]
    assert [drawn(spec, [tile], 2)[0] for tile in ids] == first
    others = make_spec(targets=(get("month"),), input=get("aster"), normalise_targets=frozenset({"aster"}))
    assert drawn(others, ids, 2) == first
    for other in (drawn(replace(spec, seed=4), ids, 2), drawn(spec, ids, 3), drawn(spec, ids, 2, "tes"),
                  drawn(spec, [tile + "0" for tile in ids], 2)):  # fmt: skip
        assert sum(a == b for a, b in zip(other, first, strict=True)) == 0


def test_the_same_row_gives_the_same_arrays_in_any_batch() -> None:
    spec, group = make_spec(), make_group(12)
    whole = prepare(spec, group, np.arange(12), epoch=5)
    parts = assemble(spec, [Piece(group, np.array(rows), 5, "set") for rows in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10, 11])])
    assert whole.keys() == parts.keys()
    mixed = prepare(spec, group, np.array([9, 2, 2]), epoch=5)
    assert mixed["id"].tolist() == ["t9", "t2", "t2"]
    for name in whole.keys() - {"id"}:
        assert whole[name].dtype == parts[name].dtype == mixed[name].dtype
        assert whole[name].tobytes() == parts[name].tobytes()
        assert mixed[name].tobytes() == whole[name][[9, 2, 2]].tobytes()


def test_visible_and_hidden_patches_are_a_partition_in_ascending_order() -> None:
    spec = make_spec()
    _, _, visible, hidden = draw(spec, [str(i) for i in range(200)], 0, "set", TILE)
    assert visible.shape == (200, VISIBLE)
    assert hidden.shape == (200, spec.patches - VISIBLE)
    assert visible.dtype == hidden.dtype == np.int16
    for one, other in zip(visible.tolist(), hidden.tolist(), strict=True):
        assert one == sorted(one)
        assert other == sorted(other)
        assert sorted(one + other) == list(range(spec.patches))
    share = np.bincount(visible.ravel(), minlength=spec.patches) / 200
    assert np.abs(share - VISIBLE / spec.patches).max() < 0.18  # five standard deviations


def test_values_keep_their_stored_types_and_agreed_shapes() -> None:
    batch = prepare(make_spec(), make_group(6), np.arange(6), epoch=0)
    for m in ALL:
        values = batch[m.name]
        if m.kind is Kind.CATEGORICAL:
            assert values.dtype == (np.int8 if m.level is Level.PIXEL else np.int16)
            assert values.shape == ((6, IMAGE, IMAGE) if m.level is Level.PIXEL else (6,))
            assert values.min() >= -1
            assert values.max() < m.width
        else:
            assert values.dtype == np.dtype(m.dtype)
            assert values.shape == (6, len(m.bands), *((IMAGE, IMAGE) if m.level is Level.PIXEL else ()))
        assert batch[m.present_column].dtype == bool
    assert batch["count"].dtype == np.int64
    assert batch["count"].shape == (6, len(ALL))
    assert batch["product"].tolist() == [0, 1, 0, 1, 0, 1]


def test_absent_layers_have_no_label_and_count_nothing() -> None:
    names = tuple(m.name for m in ALL)
    batch = prepare(make_spec(), make_group(5, valid_share=1, absent=names), np.arange(5), epoch=0)
    for m in ALL:
        assert not batch[m.present_column].any()
        if m.kind is Kind.CATEGORICAL:
            assert (batch[m.name] == -1).all()
    assert (batch["count"] == 0).all()


def test_a_label_out_of_range_is_missing() -> None:
    group = make_group(3, valid_share=1)
    group.columns["biome"][:] = [13, 14, -5]
    group.present["biome"][:] = True
    assert prepare(make_spec(), group, np.arange(3), epoch=0)["biome"].tolist() == [13, -1, -1]


def slow_valid(spec: SampleSpec, m: Modality, batch: Batch, sample: int, *where: int) -> bool:
    """Whether one value (at band, row, column; or row, column of a class map; or band) is data."""
    value = batch[m.name][(sample, *where)]
    if m.kind is Kind.CATEGORICAL:
        return bool(value >= 0)
    known = spec.known[m.name][batch["product"][sample]][where[0]] if m.name in spec.known else True
    return bool(np.isfinite(float(value)) and int(value) not in m.missing and batch[m.present_column][sample] and known)


def slow_count(spec: SampleSpec, m: Modality, batch: Batch, sample: int) -> int:
    if m.level is Level.IMAGE:
        bands = [()] if m.kind is Kind.CATEGORICAL else [(band,) for band in range(len(m.bands))]
        return sum(slow_valid(spec, m, batch, sample, *band) for band in bands)
    side, total = spec.image_size // spec.patch_size, 0
    for patch in batch["hidden"][sample].tolist():
        in_patch = 0
        for row in range(patch // side * PATCH, patch // side * PATCH + PATCH):
            for column in range(patch % side * PATCH, patch % side * PATCH + PATCH):
                bands = [()] if m.kind is Kind.CATEGORICAL else [(band,) for band in range(len(m.bands))]
                in_patch += sum(slow_valid(spec, m, batch, sample, *band, row, column) for band in bands)
        if m.name not in spec.normalise_targets or in_patch >= 2:
            total += in_patch
    return total


@pytest.mark.parametrize("valid_share", [0.6, 1 / 300, 1.0])
@pytest.mark.parametrize("normalise", [frozenset[str](), frozenset({"sentinel2", "aster", "sentinel1"})])
@pytest.mark.parametrize("all_known", [True, False])
def test_counts_equal_an_independent_count_and_that_of_the_objective(
    valid_share: float, normalise: frozenset[str], all_known: bool
) -> None:
    targets = tuple(m.select(m.bands[:3]) if m.name in ("sentinel2", "sentinel1") else m for m in ALL)
    rng = np.random.default_rng(5)
    known = {} if all_known else {m.name: rng.random((2, len(m.bands))) < 0.6 for m in targets if m.kind is Kind.CONTINUOUS}
    spec = make_spec(targets=targets, input=targets[0], normalise_targets=normalise, known=known)
    group = make_group(4, seed=1, valid_share=valid_share)
    batch = prepare(spec, group, np.arange(4), epoch=0)
    expected = [[slow_count(spec, m, batch, sample) for m in targets] for sample in range(4)]
    assert batch["count"].tolist() == expected
    assert (batch["count"] <= elements(spec)).all()
    if valid_share == 1 / 300 and normalise and all_known:  # the rule made a difference
        assert (
            batch["count"].sum() < prepare(replace(spec, normalise_targets=frozenset()), group, np.arange(4), 0)["count"].sum()
        )

    statistics = {m.name: (np.zeros((2, len(m.bands)), np.float32), np.ones((2, len(m.bands)), np.float32))
                  for m in targets if m.kind is Kind.CONTINUOUS}  # fmt: skip
    for name, bands in known.items():
        statistics[name][0][~bands] = np.nan
    model = build_mpmae(size="atto", in_channels=3, image_size=IMAGE, patch_size=PATCH, targets=targets, decoder_width=8)
    objective = Objective(model, input=targets[0], targets=targets, statistics=statistics, normalise_targets=normalise)
    assert objective.valid_counts(to_device(batch, torch.device("cpu"))).tolist() == expected


def test_elements_are_the_counts_when_nothing_is_missing() -> None:
    spec, group = make_spec(), make_group(3, valid_share=1)
    for present in group.present.values():
        present[:] = True
    batch = prepare(spec, group, np.arange(3), epoch=0)
    assert (batch["count"] == elements(spec)).all()
    hidden = (spec.patches - VISIBLE) * PATCH**2
    by_name = dict(zip([m.name for m in ALL], elements(spec).tolist(), strict=True))
    assert (by_name["sentinel2"], by_name["aster"], by_name["esa_worldcover"]) == (12 * hidden, 2 * hidden, hidden)
    assert (by_name["era5"], by_name["biome"], by_name["month"]) == (12, 1, 2)


def test_a_valid_mask_has_the_shape_of_its_values() -> None:
    spec = make_spec()
    batch = prepare(spec, make_group(3), np.arange(3), epoch=0)
    for m in ALL:
        mask = valid_mask(spec, m, batch)
        assert mask.dtype == bool
        assert mask.shape == batch[m.name].shape


def test_an_input_that_is_no_target_is_in_the_batch_but_not_counted() -> None:
    spec = make_spec(targets=(get("month"), get("biome")))
    batch = prepare(spec, make_group(2), np.arange(2), epoch=0)
    assert batch["sentinel2"].shape == (2, 12, IMAGE, IMAGE)
    assert batch["count"].shape == (2, 2)
    assert [m.name for m in spec.modalities] == ["month", "biome", "sentinel2"]
