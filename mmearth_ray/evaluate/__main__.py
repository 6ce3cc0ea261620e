"""python -m mmearth_ray.evaluate convert-... | features | score | label-efficiency: what an encoder is worth downstream."""

import sys
from typing import Any

from mmearth_ray.commands import Command, Program
from mmearth_ray.errors import run_command
from mmearth_ray.progress import counted


def _geobench_settings() -> type:
    from mmearth_ray.evaluate.datasets.convert_geobench import GeobenchOptions

    return GeobenchOptions


def _geobench(places: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.datasets.convert_geobench import convert

    return _made(places[1], convert(places[0], places[1], options))


def _arrays_settings() -> type:
    from mmearth_ray.evaluate.datasets.convert_arrays import ArraysOptions

    return ArraysOptions


def _arrays(places: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.datasets.convert_arrays import convert

    return _made(places[1], convert(places[0], places[1], options))


def _geotiffs_settings() -> type:
    from mmearth_ray.evaluate.datasets.convert_geotiffs import GeotiffsOptions

    return GeotiffsOptions


def _geotiffs(places: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.datasets.convert_geotiffs import convert

    return _made(places[1], convert(places[0], places[1], options))


def _tiles_settings() -> type:
    from mmearth_ray.evaluate.datasets.convert_tiles import TilesOptions

    return TilesOptions


def _tiles(places: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.datasets.convert_tiles import convert

    return _made(places[1], convert(places[0], places[1], options))


def _made(out: Any, info: Any) -> int:
    images = counted(sum(info.counts.values()), "image")
    parts = ", ".join(f"{name} {count:,}" for name, count in info.counts.items())
    print(f"{out}: {info.name}, {info.goal}, {images} ({parts}), {len(info.bands)} bands, digest {info.digest[:12]}")
    for note in info.notes:
        print(f"  {note}")
    return 0


def _features_settings() -> type:
    from mmearth_ray.evaluate.compare.options import FeaturesOptions

    return FeaturesOptions


def _features(_: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.compare.single import features

    return features(options)


def _score_settings() -> type:
    from mmearth_ray.evaluate.compare.options import ScoreOptions

    return ScoreOptions


def _score(_: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.compare.single import score

    return score(options)


def _efficiency_settings() -> type:
    from mmearth_ray.evaluate.compare.options import LabelEfficiencyOptions

    return LabelEfficiencyOptions


def _efficiency(_: list[Any], options: Any) -> int:
    from mmearth_ray.evaluate.compare.label_efficiency import run

    return run(options)


PROGRAM = Program("python -m mmearth_ray.evaluate", __doc__ or "", {
    "convert-geobench": Command(
        ("SET", "OUT"), "a GEO-Bench v1 set in its published form (HDF5 with pickles) -> a labelled data set",
        _geobench_settings, _geobench,
    ),
    "convert-arrays": Command(("FILE", "OUT"), "arrays of images and labels (.npz) -> a labelled data set", _arrays_settings,
                              _arrays),
    "convert-geotiffs": Command(("FOLDER", "OUT"), "GeoTIFFs with a table of labels -> a labelled data set", _geotiffs_settings,
                                _geotiffs),
    "convert-tiles": Command(
        ("SHARDS", "OUT"), "labels of the shards themselves, images of Sentinel-2 alone, a test split apart in space",
        _tiles_settings, _tiles,
    ),
    "features": Command((), "features of every image, computed once as Ray tasks and kept", _features_settings, _features),
    "score": Command((), "one encoder on one data set with all labels: scores with intervals", _score_settings, _score),
    "label-efficiency": Command(
        (), "encoders and baselines over shares of the labels: one CSV, one HTML report; goes on where it was stopped",
        _efficiency_settings, _efficiency,
    ),
})  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one subcommand and return its exit code.  Raises UsageError for a wrong command, argument or setting."""
    return PROGRAM.run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
