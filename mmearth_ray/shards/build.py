"""Building a data set shard by shard: in parallel, resumable after a kill, visible only when whole.

A finished shard leaves a record in `.building/`; running the same command again skips it.  When all are there the metadata of
their tiles are gathered in one file, the manifest is written and the records go.  A directory that holds another data set is
refused, never touched.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import atomic_text, write_failure
from mmearth_ray.modalities import TABLE, Level
from mmearth_ray.progress import ProgressLine, duration
from mmearth_ray.shards.manifest import MANIFEST, Manifest, load_manifest
from mmearth_ray.shards.metadata import write_metadata
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.write import ShardRecord, write_shard
from mmearth_ray.storage import REQUESTS, Location, exists, is_file, is_remote, names, read_bytes, remove, sizes
from mmearth_ray.tasks import in_turn, result_of

BUILDING = ".building"


class TileSource(Protocol):
    """Where the tiles of a data set come from.  Travels to Ray tasks, so it must be picklable and small."""

    def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
        """Tiles start..stop-1 in the data set's order, in blocks of at most a row group."""
        ...


def build(
    out: Location,
    source: TileSource,
    *,
    name: str,
    tiles: int,
    tile_size: int,
    shard_rows: int,
    origin: dict[str, Any],
    compression: str = "auto",
    workers: int = 1,
    release_statistics: dict[str, Any] | None = None,
) -> Manifest:
    """Write the data set into `out` and return its manifest; what an earlier, interrupted call finished is kept.

    `origin` says what is built from what: a directory that was made from anything else is refused with a DataError.
    """
    out = out.resolve()  # tasks on a joined cluster have another working directory
    compression = compression_for(out) if compression == "auto" else compression
    plan = {**origin, "tiles": tiles, "tile_size": tile_size, "shard_rows": shard_rows, "compression": compression}
    if exists(out / MANIFEST):
        manifest = load_manifest(out)
        if manifest.origin != plan:
            raise DataError(f"{out} already holds another data set ({manifest.name}); choose another directory, or remove it")
        remove(out / BUILDING)
        return manifest
    existed = exists(out)
    records = _open(out, plan)
    jobs = {i: (start, min(start + shard_rows, tiles)) for i, start in enumerate(range(0, tiles, shard_rows))}
    done = _finished(out, records, jobs)
    line = _Report(tiles, sum(record.rows for record in done.values()))
    try:
        for index, record in _run(out, source, {i: jobs[i] for i in jobs if i not in done}, tile_size, compression, workers):
            atomic_text(records / _record_name(index), json.dumps(record.to_json()))
            done[index] = record
            line.add(record.rows)
    except (DataError, UsageError):
        if not done:
            _withdraw(out, existed)
        raise
    finally:
        line.close()
    shards = tuple(done[i] for i in sorted(done))
    manifest = Manifest(out, name, tile_size, shards, plan, release_statistics, write_metadata(out, shards))
    manifest.save()
    remove(records)
    return manifest


def _open(out: Location, plan: dict[str, Any]) -> Location:
    """The folder of records, with the plan in it.  Refuses a directory that holds anything else."""
    records, text = out / BUILDING, json.dumps(plan, sort_keys=True, indent=1)
    if exists(records / "plan.json"):
        if read_bytes(records / "plan.json").decode() != text:
            raise DataError(f"{out} holds an unfinished data set of another origin; remove it, or choose another directory")
        for name in names(out):
            if name.startswith(".part-") and name.endswith(".tmp"):  # of a writer that was killed
                remove(out / name)
        return records
    if is_file(out):
        raise DataError(f"{out} is a file; name a directory")
    if set(names(out)) - {BUILDING}:
        raise DataError(f"{out} already holds other files; choose an empty or new directory")
    existed = exists(out)
    try:
        if isinstance(records, Path):
            records.mkdir(parents=True, exist_ok=True)
        atomic_text(records / "plan.json", text)
    except OSError as error:
        raise DataError(write_failure(records, error)) from error
    except DataError:
        _withdraw(out, existed)
        raise
    return records


def _withdraw(out: Location, existed: bool) -> None:
    """Leave `out` as it was found after a failure that came before the first shard, as far as that is possible."""
    with suppress(OSError, DataError):
        if any(name.startswith("part-") for name in names(out)):
            return
        remove(out / BUILDING)
        if isinstance(out, Path) and not existed:
            out.rmdir()


def _finished(out: Location, records: Location, indices: Iterable[int]) -> dict[int, ShardRecord]:
    """The records of the shards that are there already, of the size that they should have."""
    held, recorded = sizes(out), sizes(records)
    files = {index: name for index in indices if (name := _record_name(index)) in recorded}
    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = pool.map(lambda name: read_bytes(records / name), files.values())
        found = zip(files, map(_parsed, texts), strict=True)
        return {index: record for index, record in found if record and held.get(record.file) == record.bytes}


def _record_name(index: int) -> str:
    return f"{index:05d}.json"


def _parsed(text: bytes) -> ShardRecord | None:
    try:
        return ShardRecord(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _run(
    out: Location, source: TileSource, jobs: dict[int, tuple[int, int]], tile_size: int, compression: str, workers: int
) -> Iterator[tuple[int, ShardRecord]]:
    """Yield each shard's record as it is finished; with several workers the shards are Ray tasks."""
    write: Callable[..., ShardRecord] = _write
    if workers <= 1 or len(jobs) <= 1:
        for index, (start, stop) in jobs.items():
            yield index, write(out, index, source, start, stop, tile_size, compression)
        return
    join_or_start(workers)
    task = ray.remote(num_cpus=1, max_retries=3)(_write)
    held = ray.put(source)

    def submit(job: tuple[int, tuple[int, int]]) -> Any:
        index, (first, last) = job
        return task.remote(out, index, held, first, last, tile_size, compression)

    result = partial(result_of, doing="wrote a shard", kept="shards")
    for (index, _), record in in_turn(jobs.items(), submit, result, lambda: 2 * workers):
        yield index, record


def _write(
    out: Location, index: int, source: TileSource, start: int, stop: int, tile_size: int, compression: str
) -> ShardRecord:
    return write_shard(out / f"part-{index:05d}.parquet", source.blocks(start, stop), tile_size, compression)


def rows_per_shard(tile_size: int, megabytes: int) -> int:
    """Tiles of a shard of about that many (raw) megabytes, a whole number of row groups."""
    maps = [m for m in TABLE if m.level is Level.PIXEL]
    bytes_per_tile = tile_size * tile_size * sum(len(m.bands) * np.dtype(m.dtype).itemsize for m in maps)
    rows = rows_per_group(tile_size)
    return rows * max(1, round(megabytes * 1e6 / bytes_per_tile / rows))


def compression_for(out: Location) -> str:
    """What suits the medium: a disk gives bytes faster than ZSTD unpacks them, LZ4 five times as fast; a network does not."""
    return "zstd" if is_remote(out) else "lz4"


def rows_per_group(tile_size: int) -> int:
    """Tiles of a row group: 8 of 128 px, 16 of 64 px, where a band's chunk has 256 or 128 KB.

    The row groups at the edges of a worker's share of a step are decoded by its neighbour as well, so they are as small as
    they can be before the cost of a group itself shows (benchmarks/NOTES.md).
    """
    return min(32, max(4, 1024 // tile_size))


def file_identity(path: Path) -> str:
    """A short digest of a small file's bytes, or of a large one's size and edges, to tell whether it is the same file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return hashlib.sha256(head + file.read() + str(size).encode()).hexdigest()[:16]


class _Report:
    """Progress of a build: tiles done, tiles per second, time left."""

    def __init__(self, tiles: int, already: int) -> None:
        self.tiles, self.already, self.fresh = tiles, already, 0
        self.line, self.started = ProgressLine(), time.monotonic()
        if already:
            self.line.show(f"{already:,} of {tiles:,} tiles were already written", force=True)

    def add(self, rows: int) -> None:
        self.fresh += rows
        rate = self.fresh / max(time.monotonic() - self.started, 1e-9)
        left = (self.tiles - self.already - self.fresh) / rate
        done = self.already + self.fresh
        self.line.show(
            f"{done:,} of {self.tiles:,} tiles, {rate:,.0f} tiles/s, {duration(left)} left", force=done == self.tiles
        )

    def close(self) -> None:
        self.line.close()
