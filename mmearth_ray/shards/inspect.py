"""What a data set holds, as a table; and one of its tiles, as a figure."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmearth_ray.errors import DataError
from mmearth_ray.files import write_failure
from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.progress import counted
from mmearth_ray.settings import key
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.shards.read import filler, open_shard, read_block, shard_ids
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.storage import Location

_SHOWN = ("name", "tiles", "tile_size")
"""Entries of a manifest's origin that the head shows in lines of their own."""


@dataclass(frozen=True)
class InspectOptions:
    """Settings of `inspect`."""

    figure: str | None = key(None, "PNG to draw a tile into; null: none")
    tile: str | None = key(None, "id of the tile to draw; null: the first")


def describe(manifest: Manifest) -> str:
    """The data set as text: a head of facts, then a table of modalities and bands."""
    return "\n".join([*_head(manifest), "", *_table(manifest)])


def _head(manifest: Manifest) -> Iterator[str]:
    splits, products = Counter[str](), Counter[str]()
    dates: list[str] = []
    for shard in manifest.shards:
        splits.update(shard.splits)
        products.update(shard.products)
        dates += [day for day in shard.dates if day]
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "name": manifest.name,
        "origin": ", ".join(f"{k} {v}" for k, v in manifest.origin.items() if k not in _SHOWN and not isinstance(v, dict)),
        "tiles": f"{manifest.rows:,} in {counted(len(manifest.shards), 'shard')}",
        "bytes": f"{size:,} ({size / max(manifest.rows, 1) / 1000:,.1f} kB a tile)",
        "tile size": f"{manifest.tile_size} px",
        "splits": _counts(splits),
        "products": _counts(products),
        "dates": f"{min(dates)} to {max(dates)}" if dates else "unknown",
        "release": "with its published band statistics" if manifest.release_statistics else "no published band statistics",
        "digest": manifest.digest,
    }
    return (f"{name:<11}{fact}" for name, fact in facts.items())


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items()))


def _table(manifest: Manifest) -> Iterator[str]:
    """One line per modality with its coverage, below it one per band and product with its statistics (training split).

    Coverage is a share of all tiles or pixels; a line of one product counts the tiles of that product only.
    """
    yield f"{'modality':<34}{'tiles present':>14}{'valid values':>14}{'mean':>13}{'std':>13}  unit"
    present, products = Counter[str](), Counter[str]()
    for shard in manifest.shards:
        present.update(shard.present)
        products.update(shard.products)
    for m in manifest.table:
        pixels = manifest.tile_size**2 if m.level is Level.PIXEL else 1
        counts = {column: sum(v.get(column, 0) for v in manifest.valid.values()) for column in m.columns}
        share = sum(counts.values()) / max(manifest.rows * pixels * len(m.columns), 1)
        tail = f"  {len(m.classes)} classes" if m.kind is Kind.CATEGORICAL else ""
        yield f"{m.name:<34}{_percent(present[m.name] / max(manifest.rows, 1)):>14}{_percent(share):>14}{tail}"
        for variant, bands in manifest.statistics.get(m.name, {}).items():
            values = pixels * (products[variant] if m.by_product else manifest.rows)
            for band, column in zip(m.bands, m.columns, strict=True):
                label = f"  {band}" + (f" ({variant})" if m.by_product else "")
                count = manifest.valid.get(variant, {}).get(column, 0)
                numbers = (_number(bands[band]["mean"]), _number(bands[band]["std"]))
                unit = m.units[m.bands.index(band)] if m.units else ""
                line = f"{label:<34}{'':>14}{_percent(count / max(values, 1)):>14}{numbers[0]:>13}{numbers[1]:>13}  {unit}"
                yield line.rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


# ---- one tile ----


def find_tile(manifest: Manifest, tile: str | None) -> TileBlock:
    """A block of that one tile (the first if none is named).  Raises DataError if there is none of that id."""
    for record in manifest.shards:
        for group, ids in shard_ids(manifest, record):
            if tile is None or tile in ids:
                with open_shard(manifest.directory / record.file) as file:
                    block = read_block(file, group, manifest.tile_size, manifest.table)
                return _only(block, ids.index(tile) if tile is not None else 0)
    raise DataError(f"{manifest.directory} has no tile '{tile}'" if tile is not None else f"{manifest.directory} has no tiles")


def _only(block: TileBlock, row: int) -> TileBlock:
    cut = slice(row, row + 1)
    return TileBlock(
        id=block.id[cut], latitude=block.latitude[cut], longitude=block.longitude[cut], date=block.date[cut],
        product=block.product[cut], crs=block.crs[cut], split=block.split[cut], source=block.source[cut],
        layers={name: layer[cut] for name, layer in block.layers.items()},
        present={name: flags[cut] for name, flags in block.present.items()},
    )  # fmt: skip


def tile_layers(block: TileBlock, modalities: tuple[Modality, ...], tile_size: int) -> dict[str, np.ndarray]:
    """Raw values of the block's first tile, by modality; a layer that is not present is all "no data"."""
    layers = {}
    for m in modalities:
        layer = block.layers[m.name] if block.present[m.name][0] else filler(m, 1, tile_size)
        layers[m.name] = layer[0]
    return layers


def tile_facts(block: TileBlock) -> dict[str, str]:
    """Where the block's first tile comes from, in words."""
    place = f"{block.latitude[0]:.4f}, {block.longitude[0]:.4f}" if np.isfinite(block.latitude[0]) else "unknown"
    return {
        "place": place,
        "date": block.date[0].isoformat() if (day := block.date[0]) and day else "unknown",
        "product": block.product[0],
        "crs": block.crs[0] or "unknown",
        "split": block.split[0],
        "source": block.source[0],
    }


def draw(directory: Location, options: InspectOptions) -> str:
    """Draw a tile into `options.figure` and return its id.  Raises DataError if there is no such tile, or no writing there."""
    from mmearth_ray.report.tile import draw_tile  # matplotlib is slow to load, and a table needs none

    manifest = load_manifest(directory)
    block = find_tile(manifest, options.tile)
    layers = tile_layers(block, manifest.table, manifest.tile_size)
    title = f"{manifest.name}: tile {block.id[0]}"
    path = Path(str(options.figure))
    try:
        draw_tile(path, layers, manifest.table, title, tile_facts(block))
    except OSError as error:
        raise DataError(write_failure(path, error)) from error
    return block.id[0]
