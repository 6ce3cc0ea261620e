"""A source of samples: data sets, the plan over each one's selection, their mixture, and the way from positions to a batch."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mmearth_ray.errors import UsageError
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.storage import Location, is_remote
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.mixture import Mixture, by_size, by_weight
from mmearth_ray.stream.plan import Plan, Slice
from mmearth_ray.stream.prepare import Batch, Piece, SampleSpec, assemble
from mmearth_ray.stream.reader import RowGroup, decode, unreadable, used_columns
from mmearth_ray.stream.select import NothingSelected, Selection, select
from mmearth_ray.stream.shard import LOCAL, Fetched, Reading, Shard, fetch

T = TypeVar("T")

BATCHES_AHEAD = 2
"""Batches whose row groups are looked for ahead."""

FETCH_AHEAD = 3
"""Row groups of a store that are on their way while one is decoded."""


@dataclass(frozen=True, eq=False)
class Shards:
    """The files of a data set, by number.  Held as arrays: an object for each of thousands would take a second to unpickle."""

    folder: Location
    files: np.ndarray
    bytes: np.ndarray
    contents: np.ndarray
    footers: np.ndarray
    made: dict[int, Shard] = field(default_factory=dict)

    @staticmethod
    def of(manifest: Manifest) -> "Shards":
        records = manifest.shards
        return Shards(
            manifest.directory, np.array([r.file for r in records]), np.array([r.bytes for r in records], np.int64),
            np.array([r.content for r in records]), np.array([r.footer for r in records], np.int64),
        )  # fmt: skip

    def __getitem__(self, number: int) -> Shard:
        if number not in self.made:
            place = self.folder / str(self.files[number])
            shard = Shard(place, int(self.bytes[number]), str(self.contents[number]), int(self.footers[number]))
            self.made[number] = shard
        return self.made[number]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"made": {}}


@dataclass(frozen=True, eq=False)
class TileSet:
    """One data set of a source: its chosen rows and their order.  `name` is what its samples' randomness goes by."""

    name: str
    tile_size: int
    shards: Shards
    selection: Selection
    plan: Plan


class Part(NamedTuple):
    """What one batch takes out of one row group: which set's, and which samples."""

    tiles: int
    slice: Slice


@dataclass(frozen=True, eq=False)
class Source:
    """Everything a data task needs to make any batch of the stream; small enough to travel to each.

    Crops are of one size, or of those of `turns`, one step after the other; no batch is of two.
    """

    sets: tuple[TileSet, ...]
    mixture: Mixture
    spec: SampleSpec
    reading: Reading = field(default=LOCAL)
    turns: tuple[SampleSpec, ...] = ()
    turn: int = 1

    def spec_at(self, position: int) -> SampleSpec:
        """What the sample at a position is like: `turns`, if there are any, take turns of `turn` positions, a step, each."""
        return self.turns[position // self.turn % len(self.turns)] if self.turns else self.spec

    @property
    def samples(self) -> int:
        """Samples of all sets."""
        return sum(tiles.plan.samples for tiles in self.sets)

    @property
    def name(self) -> str:
        return "+".join(tiles.name for tiles in self.sets)

    @property
    def tiles_held(self) -> int:
        """Tiles of row groups whose rows are mixed, about; a task that prepares fewer decodes groups for some of them only."""
        mixed = [tiles.plan for tiles in self.sets if tiles.plan.window > 1]
        return sum(-(-plan.window * plan.samples // len(plan.group_sizes)) for plan in mixed)

    def parts(self, start: int, stop: int) -> list[Part]:
        """What positions start..stop-1 are made of, in order."""
        spans = self.mixture.spans(start, stop)
        return [Part(number, s) for number, first, last in spans for s in self.sets[number].plan.slices(first, last)]

    def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """One batch for each (start, stop) range of positions.  Adjacent ranges share the row groups they both touch.

        Beside what `assemble` gives: `faults` int32 (B,), requests to a store that failed before the batch came, at its first
        sample.  Where sets are mixed, ids are SET/ID.
        """
        with _Groups(self) as groups:
            planned = ((self.spec_at(start), self.parts(start, stop)) for start, stop in ranges)
            for (spec, parts), coming in _with_next(planned, BATCHES_AHEAD):
                groups.expect(part for later in (parts, *(parts for _, parts in coming)) for part in later)
                gathered, places = gather(parts)
                pieces = [self._piece(part, groups.get(part)) for part in gathered]
                batch = assemble(spec, pieces, places)
                if len(self.sets) > 1:
                    owners = np.repeat([f"{piece.dataset}/" for piece in pieces], [len(piece.rows) for piece in pieces])
                    batch["id"] = np.char.add(owners if places is None else owners[np.argsort(places)], batch["id"])
                batch["faults"] = np.zeros(len(batch["id"]), np.int32)
                batch["faults"][0] = groups.take_faults()
                yield batch

    def _piece(self, part: Part, group: RowGroup) -> Piece:
        tiles = self.sets[part.tiles]
        rows = tiles.selection.rows_of(part.slice.group)[part.slice.rows]
        return Piece(group, rows, part.slice.epoch, tiles.name)


def gather(parts: Sequence[Part]) -> tuple[list[Part], np.ndarray | None]:
    """The parts, those of one row group and epoch as one; then where each of their samples belongs, None if they are in order.

    Where data sets or row groups are mixed, a part may be of one sample, which alone costs as much to prepare as many do.
    """
    same: dict[tuple[int, int, int], list[int]] = {}
    for number, (tiles, taken) in enumerate(parts):
        same.setdefault((tiles, taken.group, taken.epoch), []).append(number)
    if len(same) == len(parts):
        return list(parts), None
    ends = np.cumsum([len(part.slice.rows) for part in parts])
    places = [np.arange(end - len(part.slice.rows), end) for end, part in zip(ends, parts, strict=True)]
    joined = [
        Part(tiles, Slice(epoch, group, np.concatenate([parts[number].slice.rows for number in numbers])))
        for (tiles, group, epoch), numbers in same.items()
    ]
    return joined, np.concatenate([places[number] for numbers in same.values() for number in numbers])


def _with_next(items: Iterable[T], count: int) -> Iterator[tuple[T, list[T]]]:
    """Each item with up to `count` that follow it."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft(), list(waiting)
    while waiting:
        yield waiting.popleft(), list(waiting)


class _Groups:
    """The decoded row groups that batches are made of; those of a store are fetched while others are decoded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.columns = used_columns(source.spec.modalities)
        self.decoded: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self.expected: list[tuple[int, int]] = []
        self.coming: dict[tuple[int, int], Future[Fetched]] = {}
        self.faults = 0
        remote = any(is_remote(tiles.shards.folder) for tiles in source.sets)
        self.pool = ThreadPoolExecutor(FETCH_AHEAD, "fetch") if remote else None

    def __enter__(self) -> "_Groups":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def expect(self, parts: Iterable[Part]) -> None:
        """Say what will be asked for, in order."""
        if self.pool:
            wanted = dict.fromkeys((part.tiles, part.slice.group) for part in parts)
            self.expected = [key for key in wanted if key not in self.decoded]  # once used, none is fetched a second time
            self._fetch_ahead(self.pool)

    def get(self, part: Part) -> RowGroup:
        """The row group of a part."""
        key = part.tiles, part.slice.group
        if key not in self.decoded:
            self.decoded[key] = self._read(*key)
            own = [held for held in self.decoded if held[0] == part.tiles]  # a rare set's group outlasts a common one's
            for held in own[: -self.source.sets[part.tiles].plan.window]:
                del self.decoded[held]
        self.decoded.move_to_end(key)
        return self.decoded[key]

    def take_faults(self) -> int:
        """Failed requests since this was asked last."""
        faults, self.faults = self.faults, 0
        return faults

    def _fetch_ahead(self, pool: ThreadPoolExecutor) -> None:
        for key in self.expected:
            if len(self.coming) >= FETCH_AHEAD:
                return
            if key not in self.coming:
                self.coming[key] = pool.submit(self._fetch, *key)

    def _read(self, tiles: int, group: int) -> RowGroup:
        coming = self.coming.pop((tiles, group), None)
        fetched = coming.result() if coming else self._fetch(tiles, group)
        if self.pool:
            self.expected = [key for key in self.expected if key != (tiles, group)]
            self._fetch_ahead(self.pool)
        self.faults += fetched.faults
        found, shard = self.source.sets[tiles], self._shard(tiles, group)
        return decode(fetched, shard, int(found.selection.group[group]), found.tile_size, self.source.spec.modalities)

    def _fetch(self, tiles: int, group: int) -> Fetched:
        shard, number = self._shard(tiles, group), int(self.source.sets[tiles].selection.group[group])
        try:
            return fetch(shard, [number], self.columns, self.source.reading)
        except LookupError as error:
            raise unreadable(shard, number, error) from error

    def _shard(self, tiles: int, group: int) -> Shard:
        found = self.source.sets[tiles]
        return found.shards[int(found.selection.shard[group])]


def open_source(
    manifests: Sequence[Manifest],
    where: str,
    spec: SampleSpec,
    *,
    key: str = "data.where",
    weights: Sequence[float] | None = None,
    window: int = 1,
    reading: Reading = LOCAL,
    metadata: Sequence[Metadata] = (),
    skip_empty: bool = False,
    turns: Sequence[SampleSpec] = (),
    turn: int = 1,
) -> Source:
    """The source of the tiles for which `where` holds; errors name it by its setting, `key`.

    `weights`: shares of the data sets in the stream; without, each tile of all sets comes once in an epoch of them together.
    `metadata`: of each data set, from a caller that chooses several times, so that it is read once.
    `skip_empty`: leave out sets without such a tile, as long as one has some.  `turns`: see `Source`.  Raises NothingSelected
    if there is none, UsageError if tiles are smaller than the crop.
    """
    sets, largest = [], max((spec, *turns), key=lambda s: s.image_size)
    metadata = metadata or [Metadata(manifest, reading) for manifest in manifests]
    for manifest, name, tiles in zip(manifests, names_of(manifests), metadata, strict=True):
        if largest.image_size > manifest.tile_size:
            named = f"model.image_size={spec.image_size}" if largest is spec else f"model.image_sizes: {largest.image_size} px"
            raise UsageError(
                f"{named} is larger than the {manifest.tile_size} px tiles of {manifest.directory}; "
                f"use at most {manifest.tile_size // largest.patch_size * largest.patch_size}"
            )
        selection = select(tiles, where, key)
        if len(selection.rows):
            plan = Plan(selection.sizes, spec.seed, window)
            sets.append(TileSet(name, manifest.tile_size, Shards.of(manifest), selection, plan))
        elif not skip_empty or (manifest is manifests[-1] and not sets):
            raise NothingSelected(f'no tile of {manifest.directory} satisfies "{where}"; `shards inspect` tells what there is')
    mixture = by_weight(weights) if weights else by_size([tiles.plan.samples for tiles in sets])
    return Source(tuple(sets), mixture, spec, reading, tuple(turns), turn)


def names_of(manifests: Sequence[Manifest]) -> list[str]:
    """The name of each data set; where several share one, with the beginning of its digest.

    Raises UsageError if a data set is given twice.
    """
    for number, manifest in enumerate(manifests):
        if manifest.digest in {other.digest for other in manifests[:number]}:
            raise UsageError(
                f"data.shards names the data set {manifest.directory} twice; to see it more often, raise its weight"
            )
    given = [manifest.name for manifest in manifests]
    return [m.name if given.count(m.name) == 1 else f"{m.name}@{m.digest[:8]}" for m in manifests]
