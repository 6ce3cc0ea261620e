"""Loaders side by side, on the same tiles and giving the same crops: ours, its parts, and what else there is.

    python -m benchmarks.bench_loader [key=value ...]      --help lists the keys

raw                  pyarrow reads the same column chunks of the same row groups, on one thread, and nothing else: the limit
checked              the same, and verifies the pages' checksums, as the reader does
reader               our reader: columns, class labels, crops, masks, valid counts
processes            the same in plain processes that hand batches over through shared memory
pipeline             the Ray Data pipeline as training uses it, in steady state; what processes are for is to compare with it
torch                a PyTorch DataLoader over our reader
hdf5                 the published way: every layer of every tile out of one HDF5 file
litdata, mosaicml-streaming      other loaders, in an environment of their own (`make peers`)

Every measurement is made in new processes, kept to so many cores; all take turns, round after round, and ratios are medians of
the rounds' own.  Files are in the page cache.  `s3` adds our reader and the pipeline from an S3 server on this machine.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import loader_store
from benchmarks.bench_pretrain import shape_of
from benchmarks.loader_clock import Job
from benchmarks.loader_parts import parts
from benchmarks.loader_report import DISK, NAMES, SHARE, STORE, Contender, Row, byte_rows, first_batches, rates, ratios
from benchmarks.loader_source import open_shards, stored_bytes, subsets
from benchmarks.loader_store import Store
from benchmarks.loader_tiles import PEERS, Tiles, base_of, chunk_bytes
from benchmarks.loader_watch import OURS, THEIRS, Measured, watch
from benchmarks.record import circumstances, table, write
from mmearth_ray import settings
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.settings import key
from mmearth_ray.shards.build import compression_for
from mmearth_ray.shards.convert import cpus
from mmearth_ray.shards.write import COMPRESSIONS
from mmearth_ray.stream.prepare import bytes_per_tile

PEER_WAYS = ("litdata", "mosaicml-streaming")
WAYS = (*NAMES, "s3")
TABLES = ("Rates", "Bytes", "CPU milliseconds per tile of the reader's parts")


@dataclass(frozen=True)
class Options:
    shapes: list[str] = key(["112/16/128", "56/8/64"], "image, patch and tile size of each comparison, as IMAGE/PATCH/TILE")
    which: list[str] = key(list(WAYS), "ways to load", among=WAYS)
    compressions: list[str] = key(list(COMPRESSIONS), "of the shards for raw, checked and reader", among=COMPRESSIONS)
    compression: str = key(compression_for(Path()), "of the shards for everything else", among=COMPRESSIONS)
    stored: str = key("zstd", "of the shards in the S3 server", among=COMPRESSIONS)
    cores: list[int] = key([1, 2], "numbers of cores", at_least=1)
    batch: int = key(32, "tiles of a batch", at_least=1)
    warm: float = key(1.0, "seconds after the first batch that do not count", at_least=0)
    seconds: float = key(3.0, "seconds of each measurement that count", above=0)
    rounds: int = key(3, "rounds", at_least=1)
    data: str = key("", "directory of shards; empty: real tiles if they lie beside this checkout, else synthetic ones")
    tiles: int = key(256, "synthetic tiles", at_least=1)
    save: bool = key(True, "write the result to benchmarks/results/")


@dataclass(frozen=True)
class Shape:
    """One comparison: sizes in px, the tiles in all forms, and the server if there is one."""

    image: int
    patch: int
    tiles: Tiles
    store: Store | None

    def __str__(self) -> str:
        return f"{self.image}/{self.patch}/{self.tiles.base.tile_size}"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    if max(options.cores) > cpus():
        raise UsageError(f"cores={options.cores}: this machine gives {cpus()}; name fewer")
    about = circumstances("benchmarks.bench_loader")
    top, tables = list[Row](), {name: list[Row]() for name in TABLES}
    for image, patch, tile in map(shape_of, options.shapes):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            served = "s3" in options.which and not loader_store.missing()
            store = stack.enter_context(loader_store.serving()) if served else None
            tiles = Tiles(base_of(options.data, tile, options.tiles, folder), folder)
            about[f"tiles of {tile} px"] = f"{tiles.base.rows} of {tiles.base.name}"
            for rows, more in zip((top, *tables.values()), compare(options, Shape(image, patch, tiles, store)), strict=True):
                rows += more
    print("\n".join([*table(top), *(line for name, rows in tables.items() for line in ("", f"{name}:", "", *table(rows)))]))
    if options.save:
        print(f"written to {write('loader', about, top, tables)}")
    return 0


def compare(options: Options, shape: Shape) -> tuple[list[Row], ...]:
    """Rows of ratios, of rates, of bytes and of the reader's parts."""
    jobs = list(jobs_of(options, shape))
    found: dict[tuple[Contender, int], list[Measured]] = {(contender, job.cores): [] for contender, job in jobs}
    for number in range(options.rounds):
        for contender, job in jobs:
            one = watch(job, THEIRS if contender.way in PEER_WAYS else OURS)
            found[contender, job.cores].append(one)
            print(f"{shape}, round {number + 1}: {NAMES[contender.way]}, {contender.medium}, {contender.compression}, "
                  f"{job.cores} cores: {one.tiles_per_second:.0f} tiles/s", flush=True)  # fmt: skip
    source = open_shards(str(shape.tiles.shards(options.compression)), shape.image, shape.patch)
    modalities, size = source.spec.modalities, shape.tiles.base.tile_size
    out = {"raw": stored_bytes(modalities, size), "": bytes_per_tile(source.spec)}
    bytes_found, from_store = read_bytes(options, shape)
    return (
        [*ratios(str(shape), found), *from_store, *first_batches(str(shape), found)],
        [*rates(str(shape), found, out), *skipped(options, shape)],
        bytes_found,
        [{"image/patch/tile": str(shape), "compression": c,
          **parts(open_shards(str(shape.tiles.shards(c)), shape.image, shape.patch), options.rounds)}
         for c in options.compressions],
    )  # fmt: skip


def jobs_of(options: Options, shape: Shape) -> Iterator[tuple[Contender, Job]]:
    """Everything that is measured, in the order in which it takes its turns."""
    for contender, data in contenders(options, shape):
        for cores in options.cores:
            warm = options.warm * (2 if contender.way == "pipeline" else 1)
            yield contender, Job(contender.way, data, cores, shape.image, shape.patch, options.batch, warm, options.seconds)


def contenders(options: Options, shape: Shape) -> Iterator[tuple[Contender, str]]:
    """Each way with the data that it reads."""
    tiles, usual = shape.tiles, options.compression
    for way in options.which:
        if way in ("raw", "checked", "reader"):
            for compression in dict.fromkeys((*options.compressions, usual)):
                yield Contender(way, DISK, compression), str(tiles.shards(compression))
        elif way in ("processes", "pipeline", "torch"):
            yield Contender(way, DISK, usual), str(tiles.shards(usual))
        elif way == "hdf5":
            yield Contender(way, DISK, "gzip"), str(tiles.hdf5)
        elif way in PEER_WAYS and PEERS.exists():
            yield Contender(way, DISK, "none"), str(tiles.peer(way))
        elif way == "s3" and shape.store:
            url = shape.store.put(tiles.shards(options.stored))
            yield Contender("reader", STORE, options.stored), url
            yield Contender("pipeline", STORE, options.stored), url


def skipped(options: Options, shape: Shape) -> list[Row]:
    """Rows for what could not be measured, with what it takes."""
    reasons = {way: "skipped: make peers" for way in PEER_WAYS if not PEERS.exists()}
    if not shape.store:
        reasons["s3"] = f"skipped: {loader_store.missing()} is not installed"
    return [
        {"image/patch/tile": str(shape), "way": NAMES.get(way, STORE), "note": reasons[way]}
        for way in options.which
        if way in reasons
    ]


def read_bytes(options: Options, shape: Shape) -> tuple[list[Row], list[Row]]:
    """What experiments that read ever less would read of the shards; then what the server sent for them, as ratios."""
    rows, ratios_found = [], []
    for compression in dict.fromkeys((*options.compressions, options.compression, options.stored)):
        shards = shape.tiles.shards(compression)
        specs = {name: open_shards(str(shards), shape.image, shape.patch, *chosen).spec for name, chosen in subsets().items()}
        used = {name: chunk_bytes(shards, spec.modalities) for name, spec in specs.items()}
        rows += byte_rows(str(shape), compression, shape.tiles.base.rows, used)
        if shape.store and compression == options.stored:
            url = shape.store.put(shards)
            for name, chosen in subsets().items():
                opened, sent = shape.store.bytes_of_an_epoch(url, shape.image, shape.patch, options.batch, *chosen)
                ratios_found.append({
                    "image/patch/tile": str(shape), "compared": f"bytes from S3 / used bytes, {name}",
                    "compression": compression, SHARE: sent / used[name], "with opening": (opened + sent) / used[name],
                    "wanted": 1.05,
                })  # fmt: skip
    narrow = [row for row in rows if row["reads"] == list(subsets())[-1]]
    return rows, [
        *({"image/patch/tile": str(shape), "compared": f"{row['reads']} / {row['of']}, bytes",
           "compression": row["compression"], SHARE: row[SHARE], "wanted": 0.3} for row in narrow),
        *ratios_found,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
