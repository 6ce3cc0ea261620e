"""The labelled images that a pretraining run is evaluated on as it goes: held-out tiles of its shards, or a data set it names.

Held-out tiles are read once and written as a labelled data set into the run directory.  Half of them, whole blocks of places,
fit the protocols, the other half tests them.

Shapes: N tiles, C bands, H x W pixels, S the side of a tile that is used.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmearth_ray.config import label_of
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import FORM, SPLITS, Goal, Task, TaskInfo, load_task
from mmearth_ray.evaluate.datasets.writing import Block, write_task
from mmearth_ray.evaluate.during.halves import halves
from mmearth_ray.evaluate.protocols.splits import Round, rounds, subset
from mmearth_ray.experiment import Experiment
from mmearth_ray.modalities import DEFAULT_INPUT, PRODUCTS, Level, Modality
from mmearth_ray.shards.manifest import load_manifest
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.mixture import by_size
from mmearth_ray.stream.prepare import Batch, SampleSpec
from mmearth_ray.stream.select import NothingSelected
from mmearth_ray.stream.source import Source, TileSet, open_source

SEED = 0
"""Of which tiles and which half: no run's own, so that runs over the same shards are evaluated on the same."""

AT_A_TIME = 64
"""Tiles read at a time."""

LEAST_TILES = 4
"""Labelled tiles below which there is nothing to fit and to test."""

PRODUCT_OF_EACH = "products"
"""In a data set's origin: the product of every image, where they are of several."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Held-out tiles: `ids` (N,), `product` int8 (N,), `label` int (N,), `where` latitude and longitude (2, N), and stored
    values `pixels_NCSS`."""

    ids: np.ndarray
    product: np.ndarray
    label: np.ndarray
    where: np.ndarray
    pixels_NCSS: np.ndarray


def held_out_task(experiment: Experiment, folder: Path) -> Task:
    """The labelled images of `eval.task`, or of held-out tiles, which are kept in `folder`.

    Raises UsageError where there are none, or none that can be told apart; DataError for data that cannot be read.
    """
    config = experiment.config
    if config.eval.task:
        return _checked(load_task(Path(config.eval.task)), experiment.spec.input)
    label, side = label_of(config), side_of(experiment)
    decides = [FORM, experiment.identity["data"], config.data.validate_where, label.name, config.eval.tiles, side,
               identities(experiment.spec.input), SEED]  # fmt: skip
    place = folder / f"held-out-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"
    if place.is_dir():
        with suppress(DataError):  # damaged: it is drawn again
            return load_task(place)
    write_task(place, *_labelled(experiment, label, _read(experiment, label, side)))
    return load_task(place)


def round_of(task: Task, tiles: int) -> Round:
    """Rows that fit, choose and test, `tiles` at most: half of them test, and a fifth of the other half chooses."""
    found, half = rounds(task, SEED)[0], tiles // 2
    valid = _at_most(task, found.valid, half // 5)
    return Round(_at_most(task, found.train, half - len(valid)), valid, _at_most(task, found.test, half))


def products_of(task: Task) -> np.ndarray:
    """The product of each image of a data set, text (N,), None where it is not known."""
    return np.array(task.info.origin.get(PRODUCT_OF_EACH) or [task.info.product] * len(task), dtype=object)


def identities(modality: Modality) -> tuple[str, ...]:
    """The bands of an input as `TaskInfo` names them."""
    return tuple(band if modality.name == DEFAULT_INPUT else f"{modality.name}.{band}" for band in modality.bands)


def side_of(experiment: Experiment) -> int:
    """Pixels along the side that is used of a tile: all that make whole patches, of the smallest tiles."""
    patch = experiment.spec.patch_size
    return min(tiles.tile_size for tiles in experiment.source.sets) // patch * patch


def _at_most(task: Task, rows: np.ndarray, count: int) -> np.ndarray:
    return rows if len(rows) <= count else subset(task, rows, max(1, count) / len(rows), SEED)


def _checked(task: Task, entry: Modality) -> Task:
    info, own = task.info, identities(entry)
    if info.goal is Goal.SEGMENTATION:
        raise UsageError(f"eval.task={task.folder} has a class for every pixel, and evaluations beside training take labels of "
                         "whole images; name another data set, or use `python -m mmearth_ray.evaluate score`")  # fmt: skip
    if not set(own) & set(info.bands):
        raise UsageError(f"eval.task={task.folder} has the bands {', '.join(info.bands)}, and the encoder takes "
                         f"{', '.join(own)}; name a data set that shares some")  # fmt: skip
    found = rounds(task, SEED)[0]
    if info.goal is Goal.SINGLE and len(np.unique(task.labels(found.train))) < 2:
        raise UsageError(f"eval.task={task.folder}: its training images are all of one class; name another data set")
    return task


def _read(experiment: Experiment, label: Modality, side: int) -> Tiles:
    """The first held-out tiles, in an order of their own, that have the label and the input.  Raises UsageError for none."""
    config = experiment.config
    manifests = [load_manifest(tiles.shards.folder) for tiles in experiment.source.sets]
    reading = experiment.source.reading
    metadata = [Metadata(manifest, reading) for manifest in manifests]
    spec = replace(experiment.spec, seed=SEED, targets=(label,), normalise_targets=frozenset())
    try:
        source = open_source(manifests, config.data.validate_where, spec, key="data.validate_where", reading=reading,
                             metadata=metadata, skip_empty=True)  # fmt: skip
    except NothingSelected as error:
        raise UsageError(f'eval.every={config.eval.every}: no tile is held out (data.validate_where="'
                         f'{config.data.validate_where}"); build the shards with holdout=0.01, or name a labelled data set: '
                         "eval.task=FOLDER") from error  # fmt: skip
    tables = {str(m.manifest.directory): m.table for m in metadata}
    share = min(1.0, config.eval.tiles / source.samples)
    parts = [
        _tiles(batch, spec, label, side, tables[str(tiles.shards.folder)], tiles.name if len(source.sets) > 1 else "")
        for tiles in source.sets
        for batch in _batches(source, tiles, max(1, int(tiles.plan.samples * share)))
    ]
    return Tiles(*(np.concatenate([getattr(p, name) for p in parts], axis=1 if name == "where" else 0)
                   for name in vars(parts[0])))  # fmt: skip


def _batches(source: Source, tiles: TileSet, count: int) -> Iterator[Batch]:
    """Whole tiles of one data set, the first of its order: each a single patch, of which nothing is hidden."""
    spec = replace(source.spec, image_size=tiles.tile_size, patch_size=tiles.tile_size, visible=1)
    alone = Source((tiles,), by_size([tiles.plan.samples]), spec, source.reading)
    return alone.batches((start, min(start + AT_A_TIME, count)) for start in range(0, count, AT_A_TIME))


def _tiles(batch: Batch, spec: SampleSpec, label: Modality, side: int, table: pa.Table, name: str) -> Tiles:
    """Of a batch the tiles that have the label, and an input that the run can normalise, their middle cut out."""
    entry = spec.input
    pixels, usable = _middle(batch[entry.name], side), spec.known[entry.name][batch["product"]].any(1)
    labels = _LABELS[label.level](_middle(batch[label.name], side) if label.level is Level.PIXEL else batch[label.name])
    kept = np.flatnonzero((labels >= 0) & batch[entry.present_column] & usable)
    tiles_B = pa.array(batch["id"].tolist())
    rows = table.take(pc.index_in(tiles_B, value_set=table.column("id")))  # pyright: ignore[reportAttributeAccessIssue]
    where = np.stack([rows.column(key).to_numpy().astype(float) for key in ("latitude", "longitude")])
    ids = np.array([f"{name}/{tile}" if name else tile for tile in tiles_B.to_pylist()], dtype=object)
    return Tiles(ids[kept], batch["product"][kept], labels[kept].astype(np.int64), where[:, kept], pixels[kept])


def _middle(values: np.ndarray, side: int) -> np.ndarray:
    """The middle (..., S, S) of maps."""
    top, left = ((full - side) // 2 for full in values.shape[-2:])
    return values[..., top : top + side, left : left + side]


def _commonest(labels_NHW: np.ndarray) -> np.ndarray:
    """The class that most pixels of a tile have, (N,); -1 where none has one."""
    return np.array([np.bincount(own).argmax() if len(own := tile[tile >= 0]) else -1 for tile in labels_NHW])


_LABELS: dict[Level, Callable[[np.ndarray], np.ndarray]] = {Level.IMAGE: np.asarray, Level.PIXEL: _commonest}


def _labelled(experiment: Experiment, label: Modality, tiles: Tiles) -> tuple[TaskInfo, list[Block]]:
    """Held-out tiles as a labelled data set.  Raises UsageError where they cannot be told apart."""
    config, entry, spec = experiment.config, experiment.spec.input, "name another eval.label, or eval.task=FOLDER"
    if len(tiles.ids) < LEAST_TILES:
        raise UsageError(f"eval.every={config.eval.every}: {len(tiles.ids)} held-out tiles have a class of {label.name}, at "
                         f"least {LEAST_TILES} are needed; {spec}")  # fmt: skip
    present, labels = np.unique(tiles.label, return_inverse=True)
    names = [label.classes[place].name for place in present.tolist()]
    if len(names) < 2:
        raise UsageError(f"eval.every={config.eval.every}: all {len(tiles.ids)} held-out tiles are of one class of "
                         f"{label.name}, {names[0]}; {spec}")  # fmt: skip
    tested, block = halves(tiles.where, SEED)
    products = [PRODUCTS[place] for place in tiles.product.tolist()]
    several = len(set(products)) > 1
    side = tiles.pixels_NCSS.shape[-1]
    info = TaskInfo(
        name=f"{experiment.source.name}, held out, by {label.name}", goal=Goal.SINGLE, classes=tuple(names),
        bands=identities(entry), product=None if several else products[0], dtype=entry.dtype, height=side, width=side,
        missing=tuple(float(value) for value in entry.missing),
        origin={"kind": "held-out tiles", "where": config.data.validate_where, "label": label.name, "block_degrees": block,
                "data": experiment.identity["data"], **({PRODUCT_OF_EACH: products} if several else {})},
    )  # fmt: skip
    splits = [SPLITS[2] if tile else SPLITS[0] for tile in tested]
    return info, [Block(tiles.ids.tolist(), splits, np.full(len(splits), -1), labels.reshape(-1), tiles.pixels_NCSS)]
