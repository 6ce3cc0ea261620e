"""What the comparison of loaders says: ratios, rates and costs, and the bytes of experiments that read less."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.loader_watch import Measured

Row = dict[str, Any]

NAMES = {
    "raw": "raw pyarrow read", "checked": "raw pyarrow read with checksums", "reader": "our reader",
    "processes": "reader in plain processes", "pipeline": "Ray Data pipeline", "torch": "torch DataLoader of our reader",
    "hdf5": "HDF5, the published way", "litdata": "litdata", "mosaicml-streaming": "mosaicml-streaming",
}  # fmt: skip
DISK, STORE = "disk, cached", "S3 on loopback"
FASTER = "times as fast"
SHARE = "share of the bytes"


@dataclass(frozen=True)
class Contender:
    """A way of loading, from where, and how its data are compressed."""

    way: str
    medium: str
    compression: str


Found = Mapping[tuple[Contender, int], Sequence[Measured]]
"""What was measured in each round, by contender and cores."""

WANTED = {
    ("reader", "raw"): {"": 0.8}, ("reader", "checked"): {"": 0.8}, ("pipeline", "processes"): {"": 0.8},
    ("reader", "hdf5"): {"": 20.0, "zstd": 12.0},
    ("reader", "litdata"): {"": 1.5}, ("reader", "mosaicml-streaming"): {"": 1.5},
    ("torch", "litdata"): {"": 1.5}, ("torch", "mosaicml-streaming"): {"": 1.5},
}  # fmt: skip
"""Which ways are compared, and what the ratio should be at least; by compression where it matters."""

PEERS = ("litdata", "mosaicml-streaming")


def ratios(shape: str, found: Found) -> list[Row]:
    """How many times as fast one way is as another, for every compression of the first and number of cores."""
    return [
        {
            "image/patch/tile": shape, "compared": f"{NAMES[mine.way]} / {NAMES[other.way]}", "compression": mine.compression,
            "cores": cores, FASTER: ratio(found[mine, cores], found[other, cores]),
            "wanted": WANTED[mine.way, other.way].get(mine.compression, WANTED[mine.way, other.way][""]),
        }
        for mine, cores in found
        for other, same in found
        if same == cores and comparable(mine, other, cores)
    ]  # fmt: skip


def comparable(mine: Contender, other: Contender, cores: int) -> bool:
    """Whether the two are compared: on the disk, of the same compression where both have the choice, and like with like.  Other
    loaders hand batches over where there are several cores, so that our reader meets them in a DataLoader there."""
    if (mine.way, other.way) not in WANTED or {mine.medium, other.medium} != {DISK}:
        return False
    if other.way in PEERS:
        return mine.way == ("reader" if cores == 1 else "torch")
    return other.way == "hdf5" or mine.compression == other.compression


def ratio(mine: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """Median of the rounds' own ratios of tiles per second."""
    return statistics.median(a.tiles_per_second / b.tiles_per_second for a, b in zip(mine, theirs, strict=True))


def rates(shape: str, found: Found, bytes_out: Mapping[str, int]) -> list[Row]:
    """Medians over the rounds; the most memory of all.  `bytes_out`: bytes of a tile as each way gives it, by way or ""."""
    return [
        {
            "image/patch/tile": shape, "way": NAMES[contender.way], "from": contender.medium,
            "compression": contender.compression, "cores": cores,
            "tiles/s": (rate := statistics.median(m.tiles_per_second for m in rounds)),
            "MB/s": rate * bytes_out.get(contender.way, bytes_out[""]) / 1e6,
            "CPU ms/tile": 1e3 * statistics.median(m.cpu_per_tile for m in rounds),
            "peak GB": max(m.peak for m in rounds) / 1e9,
            "first batch s": statistics.median(m.first for m in rounds),
        }
        for (contender, cores), rounds in found.items()
    ]  # fmt: skip


def first_batches(shape: str, found: Found) -> list[Row]:
    """How long the pipeline takes to its first batch once Ray runs, and whether it wrote to disk."""
    return [
        {
            "image/patch/tile": shape, "compared": "first batch of the pipeline", "compression": contender.compression,
            "cores": cores, "seconds": statistics.median(m.first for m in rounds),
            "spilled": "yes" if any(m.spilled for m in rounds) else "no", "wanted": 5.0,
        }
        for (contender, cores), rounds in found.items()
        if contender.way == "pipeline" and contender.medium == DISK
    ]  # fmt: skip


def byte_rows(shape: str, compression: str, tiles: int, read: Mapping[str, int]) -> list[Row]:
    """Bytes per tile of experiments that read ever less, `read` in all, and each as a share of the one before."""
    names = list(read)
    return [
        {
            "image/patch/tile": shape, "reads": name, "compression": compression, "KB/tile": read[name] / tiles / 1e3,
            SHARE: read[name] / read[names[max(0, place - 1)]], "of": names[max(0, place - 1)],
        }
        for place, name in enumerate(names)
    ]  # fmt: skip
