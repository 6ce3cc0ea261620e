"""Other loaders on the same tiles: litdata and mosaicml-streaming, in the environment that `make peers` makes.

    .venv-peers/bin/python -m benchmarks.loader_peers write KIND TILES OUT       tiles that the benchmark exported
    .venv-peers/bin/python -m benchmarks.loader_peers samples KIND OUT IMAGE FILE     each tile once as the loader gives it
    .venv-peers/bin/python -m benchmarks.loader_peers measure JOB                one line of JSON
    .venv-peers/bin/python -m benchmarks.loader_peers versions

Each stores a tile as NumPy arrays of the stored types in its own binary format, uncompressed: its data sets with zstd are
unpacked to disk when they are first read and read as these from then on.  Each is read as its documentation says: its dataset
in PyTorch's DataLoader, with no worker processes on one core, with one per core on several.  Crops and class labels are made in
`__getitem__`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.loader_clock import LINGER, Job, box_of, pin, stretch, take

KINDS = ("litdata", "mosaicml-streaming")
CHUNK = 64 << 20
"""Bytes of a file, as both have by default."""

Tile = dict[str, Any]


def main(arguments: list[str]) -> int:
    # the compiled operators of torchvision, which both import, may not fit the PyTorch that is installed
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
    command, *rest = arguments
    return COMMANDS[command](*rest)


def _versions() -> int:
    print(json.dumps({name: version(name) for name in (*KINDS, "torch", "numpy")}))
    return 0


@cache
def described(folder: str) -> dict[str, Any]:
    """What was exported: `ids`, `size` in px, `maps`, `labels` of class maps by name, and `repeats`, how often an epoch holds
    each tile."""
    return json.loads((Path(folder) / "tiles.json").read_text(encoding="utf-8"))


@cache
def arrays(folder: str) -> dict[str, np.ndarray]:
    """The exported arrays, (tiles, ...) each, by modality."""
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(Path(folder).glob("*.npy"))}


def exported(folder: str, index: int) -> Tile:
    """One exported tile, counted through all repeats: its `id` and an array for each modality."""
    row = index % len(described(folder)["ids"])
    return {"id": described(folder)["ids"][row], **{name: np.array(values[row]) for name, values in arrays(folder).items()}}


def cropped(tile: Tile, size: int, about: dict[str, Any]) -> Tile:
    """The tile as it is trained on: maps (C, h, w) cropped to `size` px, class maps as int8 labels (h, w), the rest as is."""
    top, left = box_of(tile["id"], about["size"] - size + 1)
    box = (..., slice(top, top + size), slice(left, left + size))
    out = dict(tile)
    for name in about["maps"]:
        out[name] = tile[name][box]
    for name, labels in about["labels"].items():
        out[name] = _labels(tuple(labels))[out[name][0]]
    return out


@cache
def _labels(labels: tuple[int, ...]) -> np.ndarray:
    return np.array(labels, np.int8)


# ---- writing ----


def _write(kind: str, folder: str, out: str) -> int:
    count = len(described(folder)["ids"]) * described(folder)["repeats"]
    _WRITE[kind](folder, out, count)
    (Path(out) / "about.json").write_text(json.dumps(described(folder)), encoding="utf-8")
    return 0


def _write_litdata(folder: str, out: str, count: int) -> None:
    import_module("litdata").optimize(
        fn=partial(exported, folder), inputs=list(range(count)), output_dir=out, chunk_bytes=CHUNK, num_workers=1, verbose=False
    )


def _write_mosaic(folder: str, out: str, count: int) -> None:
    columns = {"id": "str"}
    for name, values in arrays(folder).items():
        columns[name] = ":".join(["ndarray", str(values.dtype), ",".join(map(str, values.shape[1:] or (1,)))])
    with import_module("streaming").MDSWriter(columns=columns, out=out, size_limit=CHUNK) as writer:
        for index in range(count):
            tile = exported(folder, index)
            writer.write({name: np.atleast_1d(value) if name != "id" else value for name, value in tile.items()})


_WRITE: dict[str, Callable[[str, str, int], None]] = {"litdata": _write_litdata, "mosaicml-streaming": _write_mosaic}


# ---- reading ----


def dataset(kind: str, folder: str, size: int, batch: int) -> Any:
    """The loader's dataset of cropped tiles, in the order in which they were written."""
    about = json.loads((Path(folder) / "about.json").read_text(encoding="utf-8"))
    base = import_module("litdata" if kind == "litdata" else "streaming").StreamingDataset
    given = {"input_dir": folder} if kind == "litdata" else {"local": folder, "batch_size": batch, "num_canonical_nodes": 1}

    class Tiles(base):
        def __getitem__(self, index: Any) -> Tile:
            return cropped(super().__getitem__(index), size, about)

    return Tiles(**given, shuffle=False)


def _samples(kind: str, folder: str, image: str, file: str) -> int:
    tiles = dataset(kind, folder, int(image), 1)
    found: dict[str, Tile] = {}
    for tile in tiles:
        found.setdefault(tile["id"], tile)
    np.savez(file, **{f"{name}/{key}": value for name, tile in found.items() for key, value in tile.items() if key != "id"})
    return 0


def _measure(text: str) -> int:
    job = Job.from_json(text)
    pin(job.cores)
    torch = import_module("torch")
    torch.set_num_threads(1)
    workers = job.cores if job.cores > 1 else 0
    loader = torch.utils.data.DataLoader(
        dataset(job.way, job.data, job.image, job.batch), job.batch, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    taken = take(_tiles(loader), job)
    time.sleep(LINGER)
    print(json.dumps(asdict(stretch([taken], job.warm))))
    return 0


def _tiles(loader: Any) -> Iterator[int]:
    """Tiles of each batch, over all epochs; what an epoch needs to start, up to its first batch, is not counted."""
    for epoch in range(sys.maxsize):
        for number, batch in enumerate(loader):
            yield len(batch["id"]) if number or not epoch else 0


COMMANDS: dict[str, Callable[..., int]] = {
    "write": _write, "samples": _samples, "measure": _measure, "versions": _versions
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
