"""Checking a data set against its manifest and against the table of modalities, with a row group in memory at a time.

A problem means that the data set must not be trained on; a warning is worth a look.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmearth_ray.copies import at_hand
from mmearth_ray.errors import DataError
from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.progress import ProgressLine, counted, duration
from mmearth_ray.settings import key
from mmearth_ray.shards.manifest import MANIFEST, Manifest, load_manifest
from mmearth_ray.shards.metadata import METADATA, read_metadata, shard_metadata
from mmearth_ray.shards.read import open_shard, read_block, shard_ids
from mmearth_ray.shards.schema import TileBlock, arrow_schema, has_value, validity
from mmearth_ray.shards.stats import MomentTable, block_moments, merge_tables
from mmearth_ray.shards.write import TRAINING_SPLIT, ShardRecord, tally_valid
from mmearth_ray.storage import Absent, Location, names

RELATIVE_ERROR = 1e-9
"""Float64 moments may differ by this much when a later numpy adds the same numbers in another order."""


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of `verify`."""

    values: bool = key(True, "read every value, to check ranges, classes and presence; false: only files, schema and ids")
    sample: float = key(0.1, "fraction of the shards, at least one, whose statistics are computed again", at_least=0, at_most=1)


@dataclass
class Findings:
    """What a check found: one line per problem, one per warning."""

    tiles: int = 0
    shards: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        size = f"{counted(self.tiles, 'tile')} in {counted(self.shards, 'shard')}"
        return f"{counted(len(self.problems), 'problem')} in {size}" if self.problems else f"ok: {size}"


def verify(directory: Location, options: VerifyOptions) -> Findings:
    """Check a whole data set; a shard on a store is copied to this machine while it is checked.

    Raises DataError if its manifest is absent, damaged, or of another version or table, or if its store does not answer.
    """
    manifest = load_manifest(directory)
    found = Findings(manifest.rows, len(manifest.shards))
    found.problems += stray_files(manifest)
    sampled = sample(len(manifest.shards), options.sample)
    seen: dict[str, str] = {}
    told = told_metadata(manifest, found)
    line, started, done = ProgressLine(), time.monotonic(), 0
    for place, record in enumerate(manifest.shards):
        try:
            with at_hand(directory, [record.file]) as local:
                part = told.slice(done, record.rows) if told is not None else None
                check_shard(replace(manifest, directory=local), record, options.values, place in sampled, seen, part, found)
        except Absent:
            found.problems.append(f"{record.file}: is missing")
        done += record.rows
        rate = done / max(time.monotonic() - started, 1e-9)
        left = duration((manifest.rows - done) / max(rate, 1e-9))
        line.show(f"{done:,} of {manifest.rows:,} tiles checked, {rate:,.0f} tiles/s, {left} left", force=done == manifest.rows)
    line.close()
    return found


def sample(shards: int, fraction: float) -> set[int]:
    """Places of that fraction of the shards, at least one, evenly spread."""
    count = min(shards, max(1, math.ceil(shards * fraction)))
    return {int(place) for place in np.linspace(0, shards - 1, count)} if shards else set()


def check_shard(
    manifest: Manifest,
    record: ShardRecord,
    values: bool,
    statistics: bool,
    seen: dict[str, str],
    told: pa.Table | None,
    found: Findings,
) -> None:
    """Check one shard in a local directory, adding what is wrong to `found` and its tile ids to `seen`.

    `told`: the metadata of its tiles as they are gathered beside the shards, if they are.
    """
    damage = file_damage(manifest, record) or schema_damage(manifest, record)
    if damage:
        found.problems.append(f"{record.file}: {damage}")
        return
    try:
        found.problems += repeated_ids(manifest, record, seen)
        if told is not None and not told.equals(shard_metadata(manifest.directory / record.file)):
            found.problems.append(f"{record.file}: {METADATA} says something else of its tiles; build the data set again")
        if values:
            check_values(manifest, record, statistics, found)
    except DataError as error:
        found.problems.append(str(error) if record.file in str(error) else f"{record.file}: {error}")


# ---- files ----


def told_metadata(manifest: Manifest, found: Findings) -> pa.Table | None:
    """The metadata of all tiles as they are gathered beside the shards; None if they are not, or not usable."""
    try:
        return read_metadata(manifest, manifest.metadata) if manifest.metadata else None
    except DataError as error:
        found.problems.append(str(error))
        return None


def stray_files(manifest: Manifest) -> Iterator[str]:
    """A line for everything in the directory that the manifest does not name."""
    known = {MANIFEST, *(record.file for record in manifest.shards)}
    if manifest.metadata:
        known.add(manifest.metadata.file)
    for name in names(manifest.directory):
        if name not in known:
            yield f"{name}: not in the manifest; remove it"


def file_damage(manifest: Manifest, record: ShardRecord) -> str | None:
    """What is wrong with the shard's file as such, if anything: absent, another size, other bytes."""
    path = Path(str(manifest.directory / record.file))
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size:,} bytes, the manifest says {record.bytes:,}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == record.sha256 else "its bytes were altered (another SHA-256 than in the manifest)"


def schema_damage(manifest: Manifest, record: ShardRecord) -> str | None:
    """What is wrong with the shard's schema or row groups, if anything."""
    with open_shard(manifest.directory / record.file) as file:
        wanted = arrow_schema(manifest.tile_size, manifest.table)
        given = file.schema_arrow
        for column in [*wanted.names, *given.names]:
            if column not in given.names or column not in wanted.names:
                return f"column {column} is {'missing' if column not in given.names else 'not in the schema'}"
            if not given.field(column).equals(wanted.field(column)):
                return f"column {column} is {given.field(column).type}, expected {wanted.field(column).type}"
        if not given.equals(wanted, check_metadata=True):
            return "its schema's metadata or order of columns differs from what this program writes"
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if groups != record.row_groups or sum(groups) != record.rows:
            return f"has row groups of {groups} rows, the manifest says {record.row_groups}"
    return None


def repeated_ids(manifest: Manifest, record: ShardRecord, seen: dict[str, str]) -> list[str]:
    """A line for every tile id that this shard shares with itself or with the shards in `seen`, which it joins."""
    lines = []
    for _, ids in shard_ids(manifest, record):
        for tile in ids:
            if tile in seen:
                lines.append(f"{record.file}: tile id '{tile}' is also in {seen[tile]}")
            seen[tile] = record.file
    return lines


# ---- values ----


def check_values(manifest: Manifest, record: ShardRecord, statistics: bool, found: Findings) -> None:
    """Check every value of a shard, and its statistics if asked, adding what is wrong to `found`."""
    tally = _Tally()
    with open_shard(manifest.directory / record.file) as file:
        for block in _blocks(file, manifest):
            tally.add(block, manifest.table, statistics)
    found.problems += [f"{record.file}: {line}" for line in tally.problems(manifest.table)]
    found.warnings += [f"{record.file}: {line}" for line in tally.warnings()]
    found.problems += [f"{record.file}: {line}" for line in tally.disagreements(record)]
    if statistics:
        found.problems += [f"{record.file}: {line}" for line in moment_differences(tally.moments, record.moment_table())]


def _blocks(file: pq.ParquetFile, manifest: Manifest) -> Iterator[TileBlock]:
    for group in range(file.num_row_groups):
        yield read_block(file, group, manifest.tile_size, manifest.table)


def moment_differences(computed: MomentTable, recorded: MomentTable) -> Iterator[str]:
    """A line for every band whose moments are not those that were recorded."""
    for variant in sorted({*computed, *recorded}):
        mine, theirs = computed.get(variant, {}), recorded.get(variant, {})
        for column in sorted({*mine, *theirs}):
            a, b = (moments.get(column) for moments in (mine, theirs))
            same = a is not None and b is not None and a.count == b.count and all(
                math.isclose(x, y, rel_tol=RELATIVE_ERROR, abs_tol=RELATIVE_ERROR) or x == y
                for x, y in ((a.mean, b.mean), (a.m2, b.m2), (a.low, b.low), (a.high, b.high))
            )  # fmt: skip
            if not same:
                yield f"{column} ({variant}): the statistics of its values are not those in the manifest"


class _Tally:
    """What the values of one shard add up to."""

    def __init__(self) -> None:
        self.outside: Counter[tuple[str, str]] = Counter()
        self.extreme: dict[tuple[str, str], tuple[float, float]] = {}
        self.unknown: Counter[tuple[str, int]] = Counter()
        self.empty: dict[str, str] = {}
        self.empty_count: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.valid: dict[str, Counter[str]] = {}
        self.moments: MomentTable = {}

    def add(self, block: TileBlock, table: tuple[Modality, ...], statistics: bool) -> None:
        self.splits.update(block.split)
        self.products.update(block.product)
        for variant, columns in tally_valid(block, table).items():
            self.valid.setdefault(variant, Counter()).update(columns)
        if statistics:
            self.moments = merge_tables([self.moments, block_moments(block, TRAINING_SPLIT, table)])
        for m in table:
            present = block.present[m.name]
            self.present[m.name] += int(present.sum())
            lacking = np.flatnonzero(present & ~has_value(block.layers[m.name], m))
            if lacking.size:
                self.empty.setdefault(m.name, block.id[lacking[0]])
                self.empty_count[m.name] += lacking.size
            if m.kind is Kind.CONTINUOUS:
                self._add_ranges(block.layers[m.name][present], m)
            elif m.kind is Kind.CATEGORICAL:
                self._add_codes(block.layers[m.name][present], m)

    def _add_ranges(self, layer: np.ndarray, m: Modality) -> None:
        valid = validity(layer, m)
        for band, (low, high) in enumerate(m.bounds):
            values = layer[:, band][valid[:, band]]
            if not values.size or (values.min() >= low and values.max() <= high):
                continue
            unit = f" {m.units[band]}".removesuffix(" 1") if m.units else ""
            where = m.columns[band], f"{low:g} to {high:g}{unit}"
            self.outside[where] += int(((values < low) | (values > high)).sum())
            least, most = self.extreme.get(where, (math.inf, -math.inf))
            self.extreme[where] = (min(least, float(values.min())), max(most, float(values.max())))

    def _add_codes(self, layer: np.ndarray, m: Modality) -> None:
        """Count codes without a class: in maps those not among `missing`, in labels those past the last class."""
        if m.level is Level.IMAGE:
            bad = layer[(layer < -1) | (layer >= len(m.classes))]
        else:
            bad = layer[(m.label_table()[layer] < 0) & ~np.isin(layer, m.missing)]
        codes, counts = np.unique(bad, return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            self.unknown[m.columns[0], code] += count

    def problems(self, table: tuple[Modality, ...]) -> Iterator[str]:
        for (column, bounds), count in self.outside.items():
            least, most = self.extreme[column, bounds]
            yield f"{column} has {count:,} values outside {bounds} (they span {least:g} to {most:g})"
        for name, tile in self.empty.items():
            yield f"{name} is marked as present in {self.empty_count[name]:,} tiles without a valid value (first '{tile}')"
        labels = {m.columns[0] for m in table if m.level is Level.IMAGE and m.kind is Kind.CATEGORICAL}
        for (column, code), count in self.unknown.items():
            if column in labels:
                yield f"{column} has {count:,} labels {code}, which is no class"

    def warnings(self) -> Iterator[str]:
        for (column, code), count in self.unknown.items():
            yield f"{column} has {count:,} values {code}, which is no class; they are read as missing"

    def disagreements(self, record: ShardRecord) -> Iterator[str]:
        """Lines for counts that are not those that the manifest recorded."""
        for what, mine, theirs in (
            ("tiles per split", self.splits, record.splits),
            ("tiles per product", self.products, record.products),
            ("tiles with a layer", self.present, record.present),
            *((f"valid values ({v})", self.valid.get(v, {}), record.valid.get(v, {})) for v in {*self.valid, *record.valid}),
        ):
            for name in sorted({*mine, *theirs}):
                if mine.get(name, 0) != theirs.get(name, 0):
                    yield f"{what}: {mine.get(name, 0):,} for {name}, the manifest says {theirs.get(name, 0):,}"
