"""A source of samples: the plan over one selection of a data set, and the way from a range of positions to a batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmearth_ray.errors import UsageError
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.stream.plan import Plan
from mmearth_ray.stream.prepare import Batch, Piece, SampleSpec, assemble
from mmearth_ray.stream.reader import RowGroup, read_group
from mmearth_ray.stream.select import NothingSelected, Selection, select


@dataclass(frozen=True, eq=False)
class Source:
    """Everything a data task needs to make any batch of the stream; small enough to travel to each."""

    directory: Path
    selection: Selection
    plan: Plan
    spec: SampleSpec

    @property
    def samples(self) -> int:
        return self.plan.samples

    def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """One batch for each (start, stop) range of positions.  Adjacent ranges share the row group they both touch."""
        held: tuple[int, RowGroup] | None = None
        for start, stop in ranges:
            pieces = []
            for piece in self.plan.slices(start, stop):
                if held is None or held[0] != piece.group:
                    held = (piece.group, self._read(piece.group))
                rows = self.selection.rows_of(piece.group)[piece.first : piece.last]
                pieces.append(Piece(held[1], rows, piece.epoch))
            yield assemble(self.spec, pieces)

    def _read(self, group: int) -> RowGroup:
        path = self.directory / self.selection.files[self.selection.shard[group]]
        return read_group(path, int(self.selection.group[group]), self.spec.tile_size, self.spec.modalities)


def open_source(manifest: Manifest, where: str, spec: SampleSpec, key: str = "data.where") -> Source:
    """The source of the tiles for which `where` holds; errors name it by its setting, `key`.

    Raises NothingSelected if there is none, UsageError if the tiles are smaller than the crop.
    """
    if spec.image_size > manifest.tile_size:
        raise UsageError(
            f"model.image_size={spec.image_size} is larger than the {manifest.tile_size} px tiles of {manifest.directory}; "
            f"use at most {manifest.tile_size // spec.patch_size * spec.patch_size}"
        )
    selection = select(manifest, where, key)
    if not len(selection.rows):
        raise NothingSelected(f'no tile of {manifest.directory} satisfies "{where}"; `shards inspect` tells what there is')
    return Source(manifest.directory, selection, Plan(selection.sizes, spec.seed), spec)
