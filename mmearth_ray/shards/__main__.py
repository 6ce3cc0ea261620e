"""python -m mmearth_ray.shards convert | synthesise | verify | inspect: make data sets, check them, look at them."""

import sys
from typing import Any

from mmearth_ray.commands import Command, Program
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.progress import counted
from mmearth_ray.storage import Location


def _convert_settings() -> type:
    from mmearth_ray.shards.convert import ConvertOptions

    return ConvertOptions


def _convert(places: list[Any], options: Any) -> int:
    from mmearth_ray.shards.convert import convert

    manifest = convert(places[0], places[1], options)
    return _made(manifest)


def _synthesise_settings() -> type:
    from mmearth_ray.shards.synthesise import SynthesiseOptions

    return SynthesiseOptions


def _synthesise(places: list[Location], options: Any) -> int:
    from mmearth_ray.shards.synthesise import synthesise

    manifest = synthesise(places[0], options)
    return _made(manifest)


def _made(manifest: Any) -> int:
    size = f"{counted(manifest.rows, 'tile')} in {counted(len(manifest.shards), 'shard')}"
    print(f"{manifest.directory}: {size}, digest {manifest.digest[:12]}")
    return 0


def _verify_settings() -> type:
    from mmearth_ray.shards.verify import VerifyOptions

    return VerifyOptions


def _verify(places: list[Location], options: Any) -> int:
    from mmearth_ray.shards.verify import verify

    found = verify(places[0], options)
    for line in found.warnings:
        print(f"warning: {line}")
    for line in found.problems:
        print(f"problem: {line}")
    print(found.summary())
    return 1 if found.problems else 0


def _inspect_settings() -> type:
    from mmearth_ray.shards.inspect import InspectOptions

    return InspectOptions


def _inspect(places: list[Location], options: Any) -> int:
    from mmearth_ray.shards.inspect import describe, draw
    from mmearth_ray.shards.manifest import load_manifest

    if options.tile is not None and options.figure is None:
        raise UsageError(f"tile={options.tile} is drawn into a figure: add figure=PATH.png")
    print(describe(load_manifest(places[0])))
    if options.figure is not None:
        tile = draw(places[0], options)
        print(f"\ntile {tile} drawn into {options.figure}")
    return 0


PROGRAM = Program("python -m mmearth_ray.shards", __doc__ or "", {
    "convert": Command(
        ("RELEASE_DIR", "OUT"), "a published MMEarth release (HDF5, JSON) -> shards; a killed run continues where it stopped",
        _convert_settings, _convert, urls=("OUT",),
    ),
    "synthesise": Command(("OUT",), "a procedural Earth -> shards, without any download", _synthesise_settings, _synthesise,
                          urls=("OUT",)),
    "verify": Command(("OUT",), "check every file and value against the manifest; exit code 1 if anything is wrong",
                      _verify_settings, _verify, urls=("OUT",)),
    "inspect": Command(("OUT",), "what a data set holds: coverage and statistics; figure=PATH draws a tile",
                       _inspect_settings, _inspect, urls=("OUT",)),
})  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one subcommand and return its exit code.  Raises UsageError for a wrong command, argument or setting."""
    return PROGRAM.run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
