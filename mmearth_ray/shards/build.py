"""Building a data set shard by shard: in parallel, resumable after a kill, visible only when whole.

A finished shard leaves a record in `.building/`; running the same command again skips it.  When all are there the manifest
is written and the records go.  A directory that holds another data set is refused, never touched.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import atomic_text, write_failure
from mmearth_ray.modalities import TABLE, Level
from mmearth_ray.progress import ProgressLine, duration
from mmearth_ray.shards.manifest import MANIFEST, Manifest, load_manifest
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.write import ShardRecord, write_shard

BUILDING = ".building"
ROW_GROUP = 32


class TileSource(Protocol):
    """Where the tiles of a data set come from.  Travels to Ray tasks, so it must be picklable and small."""

    def blocks(self, start: int, stop: int) -> Iterator[TileBlock]:
        """Tiles start..stop-1 in the data set's order, in blocks of at most a row group."""
        ...


def build(
    out: Path,
    source: TileSource,
    *,
    name: str,
    tiles: int,
    tile_size: int,
    shard_rows: int,
    origin: dict[str, Any],
    compression: str = "zstd",
    workers: int = 1,
    release_statistics: dict[str, Any] | None = None,
) -> Manifest:
    """Write the data set into `out` and return its manifest; what an earlier, interrupted call finished is kept.

    `origin` says what is built from what: a directory that was made from anything else is refused with a DataError.
    """
    out = out.resolve()  # tasks on a joined cluster have another working directory
    plan = {**origin, "tiles": tiles, "tile_size": tile_size, "shard_rows": shard_rows, "compression": compression}
    if (out / MANIFEST).exists():
        manifest = load_manifest(out)
        if manifest.origin != plan:
            raise DataError(f"{out} already holds another data set ({manifest.name}); choose another directory, or remove it")
        shutil.rmtree(out / BUILDING, ignore_errors=True)
        return manifest
    existed = out.exists()
    records = _open(out, plan)
    jobs = {i: (start, min(start + shard_rows, tiles)) for i, start in enumerate(range(0, tiles, shard_rows))}
    done = {i: record for i in jobs if (record := _finished(out, records, i))}
    line = _Report(tiles, sum(record.rows for record in done.values()))
    try:
        for index, record in _run(out, source, {i: jobs[i] for i in jobs if i not in done}, tile_size, compression, workers):
            atomic_text(records / f"{index:05d}.json", json.dumps(record.to_json()))
            done[index] = record
            line.add(record.rows)
    except (DataError, UsageError):
        if not done:
            _withdraw(out, existed)
        raise
    finally:
        line.close()
    manifest = Manifest(out, name, tile_size, tuple(done[i] for i in sorted(done)), plan, release_statistics)
    manifest.save()
    shutil.rmtree(records, ignore_errors=True)
    return manifest


def _open(out: Path, plan: dict[str, Any]) -> Path:
    """The folder of records, with the plan in it.  Refuses a directory that holds anything else."""
    records, text = out / BUILDING, json.dumps(plan, sort_keys=True, indent=1)
    if (records / "plan.json").exists():
        if (records / "plan.json").read_text(encoding="utf-8") != text:
            raise DataError(f"{out} holds an unfinished data set of another origin; remove it, or choose another directory")
        for left_over in out.glob(".part-*.tmp"):  # of writers that were killed
            left_over.unlink(missing_ok=True)
        return records
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a directory")
    if out.exists() and any(p.name != BUILDING for p in out.iterdir()):
        raise DataError(f"{out} already holds other files; choose an empty or new directory")
    existed = out.exists()
    try:
        records.mkdir(parents=True, exist_ok=True)
        atomic_text(records / "plan.json", text)
    except OSError as error:
        raise DataError(write_failure(records, error)) from error
    except DataError:
        _withdraw(out, existed)
        raise
    return records


def _withdraw(out: Path, existed: bool) -> None:
    """Leave `out` as it was found after a failure that came before the first shard."""
    if any(out.glob("part-*.parquet")):
        return
    shutil.rmtree(out / BUILDING, ignore_errors=True)
    if not existed:
        with suppress(OSError):
            out.rmdir()


def _finished(out: Path, records: Path, index: int) -> ShardRecord | None:
    with suppress(OSError, ValueError, TypeError):
        record = ShardRecord(**json.loads((records / f"{index:05d}.json").read_text(encoding="utf-8")))
        if (out / record.file).stat().st_size == record.bytes:
            return record
    return None


def _run(
    out: Path, source: TileSource, jobs: dict[int, tuple[int, int]], tile_size: int, compression: str, workers: int
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
    waiting = list(jobs.items())
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                index, (start, stop) = waiting.pop(0)
                running[task.remote(out, index, held, start, stop, tile_size, compression)] = index
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                yield running.pop(reference), _result(reference)
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:  # a cancelled writer removes what it has begun
            ray.wait(list(running), num_returns=len(running), timeout=60)


def _result(reference: Any) -> ShardRecord:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise DataError(str(error.cause)) from error
        raise
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
        raise DataError(
            f"a worker died while it wrote a shard ({type(error).__name__}); run the command again, perhaps with fewer "
            "workers: finished shards are kept"
        ) from error


def _write(out: Path, index: int, source: TileSource, start: int, stop: int, tile_size: int, compression: str) -> ShardRecord:
    return write_shard(out / f"part-{index:05d}.parquet", source.blocks(start, stop), tile_size, compression)


def rows_per_shard(tile_size: int, megabytes: int) -> int:
    """Tiles of a shard of about that many (raw) megabytes, a whole number of row groups."""
    maps = [m for m in TABLE if m.level is Level.PIXEL]
    bytes_per_tile = tile_size * tile_size * sum(len(m.bands) * np.dtype(m.dtype).itemsize for m in maps)
    groups = round(megabytes * 1e6 / bytes_per_tile / ROW_GROUP)
    return ROW_GROUP * max(1, groups)


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
