"""The tiles of the comparison, in the form that each way of loading reads: shards of each compression, HDF5, exported arrays.

They are made from one data set, in a directory of the local disk that the caller removes.  What was just written is in the page
cache, so the disk itself is not measured.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.loader_hdf5 import blocks_of, write_release
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.modalities import Kind, Level, Modality, get, tasks
from mmearth_ray.shards.convert import ConvertOptions, convert
from mmearth_ray.shards.manifest import Manifest, load_manifest
from mmearth_ray.shards.synthesise import SynthesiseOptions, synthesise
from mmearth_ray.shards.write import write_shard
from mmearth_ray.stream.reader import used_columns

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "make_release.py"
"""Writes a release from real tiles, where somebody put it."""

PEERS = ROOT / ".venv-peers" / "bin" / "python"

EPOCH = 1024
"""Tiles of an epoch of the other loaders, at least: each starts anew with an epoch, and reads ahead within one only."""


class Tiles:
    """One data set in all forms, each made when it is first asked for."""

    def __init__(self, base: Manifest, folder: Path) -> None:
        self.base, self.folder = base, folder

    def shards(self, compression: str) -> Path:
        """The tiles in shards of that compression, row groups and shards as in the data set."""
        out = self.folder / f"shards-{compression}"
        if not out.exists():
            out.mkdir(parents=True)
            blocks, records = blocks_of(self.base), []
            for record in self.base.shards:
                own = [next(blocks) for _ in record.row_groups]
                records.append(write_shard(out / record.file, own, self.base.tile_size, compression))
            Manifest(out, self.base.name, self.base.tile_size, tuple(records), {"kind": "benchmark"}).save()
        return out

    @cached_property
    def hdf5(self) -> Path:
        """The tiles in an HDF5 file of the published layout."""
        path = self.folder / "tiles.h5"
        write_release(self.base, path)
        return path

    @cached_property
    def exported(self) -> Path:
        """The bands and labels that training uses, an array for each modality (see `benchmarks.loader_peers`)."""
        out = self.folder / "arrays"
        out.mkdir()
        blocks = list(blocks_of(self.base))
        maps = [m for m in tasks() if m.level is Level.PIXEL]
        for m in tasks():
            np.save(out / f"{m.name}.npy", np.concatenate([_used(m, block.layers[m.name]) for block in blocks]))
        ids = [tile for block in blocks for tile in block.id]
        labels = {m.name: m.label_table().tolist() for m in maps if m.kind is Kind.CATEGORICAL}
        about = {"ids": ids, "size": self.base.tile_size, "maps": [m.name for m in maps], "labels": labels,
                 "repeats": math.ceil(EPOCH / len(ids))}  # fmt: skip
        (out / "tiles.json").write_text(json.dumps(about), encoding="utf-8")
        return out

    def peer(self, kind: str) -> Path:
        """The tiles in the form of another loader.  Raises DataError, with its last words, if it does not take them."""
        out = self.folder / kind
        if not out.exists():
            run([str(PEERS), "-m", "benchmarks.loader_peers", "write", kind, str(self.exported), str(out)])
        return out


def run(command: Sequence[str]) -> str:
    """What a command prints.  Raises DataError, with its last words, if it fails."""
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if found.returncode:
        words = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{' '.join(command[1:5])} failed: {words}")
    return found.stdout


def base_of(data: str, tile: int, tiles: int, folder: Path) -> Manifest:
    """The data set that is given; else one of the real tiles of that size, where there are any; else one of synthetic ones.

    Raises UsageError if the given one is of another tile size.
    """
    if data:
        manifest = load_manifest(Path(data).resolve())
        if manifest.tile_size != tile:
            size = manifest.tile_size
            raise UsageError(f"{data} has tiles of {size} px, the shape asks for {tile} px; use shapes=IMAGE/PATCH/{size}")
        return manifest
    if REAL.exists():
        run([sys.executable, str(REAL), str(folder), "--size", str(tile)])
        (release,) = (path.parent for path in folder.glob("*/*.h5"))
        return convert(release, folder / "base", ConvertOptions(workers=1))
    return synthesise(folder / "base", SynthesiseOptions(tiles=tiles, size=tile))


def _used(m: Modality, layer: np.ndarray) -> np.ndarray:
    """The bands that training uses of a stored layer."""
    if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL:
        return layer
    stored = get(m.name).bands
    return layer[:, [stored.index(band) for band in m.bands]]


def chunk_bytes(shards: Path, modalities: tuple[Modality, ...]) -> int:
    """Bytes that the column chunks of those modalities take in all shards there, with the columns that are always read."""
    columns, total = set(used_columns(modalities)), 0
    for record in load_manifest(shards).shards:
        metadata = pq.read_metadata(shards / record.file)
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            total += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)
    return total
