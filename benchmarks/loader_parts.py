"""Where the reader's time goes: its public parts, one after the other on the same row groups, in CPU milliseconds per tile.

    python -m benchmarks.loader_parts [key=value ...]      --help lists the keys

Each part is done for every row group of the data set in turn, the fastest of several rounds counts.  `raw`: pyarrow's read of
the used columns, without and with the check of the pages' checksums; `decode`: ours, with that check; `crops`: what is left of
putting a batch together once drawing and counting are taken off.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from benchmarks.loader_source import open_shards
from benchmarks.record import table
from mmearth_ray import settings
from mmearth_ray.errors import run_command
from mmearth_ray.settings import key
from mmearth_ray.stream.prepare import Piece, assemble, draw, valid_counts
from mmearth_ray.stream.reader import decode, used_columns
from mmearth_ray.stream.shard import Shard, fetch
from mmearth_ray.stream.source import Source


@dataclass(frozen=True)
class Options:
    data: str = key("data/embedded", "directory of shards")
    image: int = key(56, "px", at_least=8)
    patch: int = key(8, "px")
    rounds: int = key(5, "rounds", at_least=1)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    print("\n".join(table([parts(open_shards(options.data, options.image, options.patch), options.rounds)])))
    return 0


def parts(source: Source, rounds: int) -> dict[str, float]:
    """CPU milliseconds per tile of each part, and of the reader: decoding and putting together."""
    (tiles,) = source.sets
    spec, columns = source.spec, used_columns(source.spec.modalities)
    places = [(tiles.shards[s], int(g)) for s, g in zip(tiles.selection.shard, tiles.selection.group, strict=True)]
    plain, checked = (
        {shard: pq.ParquetFile(str(shard.place), page_checksum_verification=check) for shard, _ in places}
        for check in (False, True)
    )
    decoded = [decode(fetch(s, [g], columns), s, g, tiles.tile_size, spec.modalities) for s, g in places]
    pieces = [Piece(group, np.arange(len(group.id)), 0, tiles.name) for group in decoded]
    batches = [assemble(spec, [piece]) for piece in pieces]

    def read(files: dict[Shard, pq.ParquetFile], number: int) -> object:
        shard, group = places[number]
        return files[shard].read_row_group(group, columns=columns, use_threads=False)

    def whole(number: int) -> object:
        shard, group = places[number]
        return decode(fetch(shard, [group], columns), shard, group, tiles.tile_size, spec.modalities)

    works: dict[str, Callable[[int], object]] = {
        "raw": lambda n: read(plain, n), "raw, checked": lambda n: read(checked, n), "decode": whole,
        "draw": lambda n: draw(spec, pieces[n].ids, 0, tiles.name, tiles.tile_size),
        "counts": lambda n: valid_counts(spec, batches[n]),
        "assemble": lambda n: assemble(spec, [pieces[n]]),
    }  # fmt: skip
    each = {name: 1e3 * _fastest(work, len(places), rounds) / source.samples for name, work in works.items()}
    crops = each["assemble"] - each["draw"] - each["counts"]
    shown = ("raw", "raw, checked", "decode", "draw", "counts")
    return {name: each[name] for name in shown} | {"crops": crops, "reader": each["decode"] + each["assemble"]}


def _fastest(work: Callable[[int], object], count: int, rounds: int) -> float:
    """CPU seconds that the work takes for the numbers 0..count-1, in the fastest of the rounds after the first."""
    found = []
    for _ in range(1 + rounds):
        begin = time.process_time()
        for number in range(count):
            work(number)
        found.append(time.process_time() - begin)
    return min(found[1:])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
