"""Data sets on an object store: the same bytes, refusals and way on after an interruption as in a directory."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3
from upath import UPath

from mmearth_ray.errors import DataError, run_command
from mmearth_ray.shards.__main__ import main
from mmearth_ray.shards.build import BUILDING
from mmearth_ray.shards.inspect import find_tile
from mmearth_ray.shards.manifest import MANIFEST, load_manifest
from mmearth_ray.shards.read import open_shard, read_block
from mmearth_ray.shards.schema import TileBlock
from mmearth_ray.shards.synthesise import ProceduralEarth, SynthesiseOptions, synthesise
from mmearth_ray.shards.verify import VerifyOptions, verify
from mmearth_ray.storage import below, locate, names, read_bytes, remove

# a row group is 0.6 MB of 16 px tiles: shards of 64 and 6 tiles
OPTIONS = SynthesiseOptions(tiles=70, size=16, shard_mb=1, compression="zstd")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "o"
    synthesise(out, OPTIONS)
    return out


@pytest.fixture
def out(s3: S3, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """A place on a store.  Waiting for it takes no time."""
    found = locate(f"{s3.make_bucket()}/data", "OUT")
    assert isinstance(found, UPath)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return found


@pytest.fixture
def quickly(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles are not computed again, but taken from the local data set."""

    def blocks(self: ProceduralEarth, start: int, stop: int) -> Iterator[TileBlock]:
        with open_shard(local / f"part-{start // 64:05d}.parquet") as file:
            yield from (read_block(file, group, self.size) for group in range(file.num_row_groups))

    monkeypatch.setattr(ProceduralEarth, "blocks", blocks)


def command(*arguments: object) -> int:
    return run_command(main, [str(a) for a in arguments])


def settings() -> list[str]:
    return [f"{name}={value}" for name, value in vars(OPTIONS).items()]


def assert_same(out: UPath, local: Path) -> None:
    assert names(out) == below(out) == sorted(path.name for path in local.iterdir())
    for path in local.iterdir():
        assert read_bytes(out / path.name) == path.read_bytes()


def test_the_commands_do_on_a_store_what_they_do_in_a_directory(
    out: UPath, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("synthesise", out, *settings()) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 70 tiles in 2 shards, digest {load_manifest(local).digest[:12]}")
    assert_same(out, local)
    assert command("verify", out, "sample=1") == 0
    assert capsys.readouterr().out == "ok: 70 tiles in 2 shards\n"
    assert command("inspect", out, "tile=65", f"figure={tmp_path / 'f.png'}") == 0
    assert "70 in 2 shards" in capsys.readouterr().out
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert command("synthesise", out, *settings()) == 0
    capsys.readouterr()
    assert command("synthesise", out, *settings(), "seed=1") == 1
    said = capsys.readouterr().err
    assert said == f"error: {out} already holds another data set (procedural-earth); choose another directory, or remove it\n"
    assert command("convert", out, tmp_path) == 2
    assert capsys.readouterr().err == f"error: RELEASE_DIR={out}: must be a path on this machine\n"


@pytest.mark.usefixtures("quickly")
def test_a_place_that_holds_anything_else_is_refused(out: UPath) -> None:
    (out / "thesis.txt").write_text("draft")
    with pytest.raises(DataError, match=f"{out} already holds other files; choose an empty or new directory"):
        synthesise(out, OPTIONS)
    with pytest.raises(DataError, match=f"{out / 'thesis.txt'} is a file; name a directory"):
        synthesise(out / "thesis.txt", OPTIONS)
    assert below(out.parent) == ["data/thesis.txt"]
    with pytest.raises(DataError, match=f"the bucket of s3://no-such-bucket/x/{BUILDING}/plan.json does not exist"):
        synthesise(UPath("s3://no-such-bucket/x", **out.storage_options), OPTIONS)
    with pytest.raises(DataError, match=f"{out / MANIFEST} does not exist, so {out} is no data set"):
        verify(out, VerifyOptions())


@pytest.mark.usefixtures("quickly")
def test_a_store_that_fails_is_asked_again_until_the_data_set_is_the_same(out: UPath, local: Path, s3: S3) -> None:
    s3.fail(slow_down=0.1, internal_error=0.1, reset=0.1, truncated=0.05, seed=1)
    synthesise(out, OPTIONS)
    found = verify(out, VerifyOptions(sample=1))
    counts = s3.counts()
    s3.fail()
    assert found.summary() == "ok: 70 tiles in 2 shards"
    assert_same(out, local)
    assert min(counts[kind] for kind in ("slow_down", "internal_error", "reset")) > 0


@pytest.mark.usefixtures("quickly")
def test_what_was_written_before_an_interruption_stays(out: UPath, local: Path, s3: S3) -> None:
    s3.fail(denied=1, only="PUT .*part-00000")
    with pytest.raises(DataError, match="access denied"):
        synthesise(out, OPTIONS)
    s3.fail()
    assert below(out) == [], "a failure before the first shard leaves nothing"

    s3.fail(denied=1, only="PUT .*part-00001")
    with pytest.raises(DataError, match=f"{out / 'part-00001.parquet'}: access denied"):
        synthesise(out, OPTIONS)
    s3.fail()
    assert below(out) == [f"{BUILDING}/00000.json", f"{BUILDING}/plan.json", "part-00000.parquet"]
    with pytest.raises(DataError, match=f"{out} holds an unfinished data set of another origin"):
        synthesise(out, SynthesiseOptions(tiles=71, size=16, shard_mb=1))

    s3.fail(denied=1, only="PUT .*part-00000")  # which is not written again
    synthesise(out, OPTIONS)
    assert_same(out, local)

    remove(out / MANIFEST)
    for name in ("plan.json", "00000.json", "00001.json"):  # killed before the manifest, with a record cut short
        record = vars(load_manifest(local).shards[int(name[4])]) if name[0] == "0" else load_manifest(local).origin
        (out / BUILDING / name).write_text(json.dumps(record, sort_keys=name[0] == "p", indent=1 if name[0] == "p" else None))
    (out / BUILDING / "00001.json").write_text("{")
    synthesise(out, OPTIONS)
    assert_same(out, local)


@pytest.mark.usefixtures("quickly")
def test_damage_on_a_store_is_found(out: UPath) -> None:
    synthesise(out, OPTIONS)
    whole = read_bytes(out / "part-00000.parquet")
    (out / "part-00000.parquet").write_bytes(whole[:-9] + b"x" + whole[-8:])
    (out / "part-00001.parquet").unlink()
    (out / "note").write_text("x")
    assert verify(out, VerifyOptions()).problems == [
        "note: not in the manifest; remove it",
        "part-00000.parquet: its bytes were altered (another SHA-256 than in the manifest)",
        "part-00001.parquet: is missing",
    ]


@pytest.mark.usefixtures("quickly")
def test_one_tile_is_read_without_the_rest(out: UPath, local: Path, s3: S3) -> None:
    synthesise(out, OPTIONS)
    manifests = [load_manifest(place) for place in (out, local)]
    s3.reset_counts()
    there, here = (find_tile(manifest, "40") for manifest in manifests)
    assert s3.counts()["bytes"] < 0.8 * manifests[0].shards[0].bytes
    assert there.id == here.id == ["40"]
    for name, layer in here.layers.items():
        np.testing.assert_array_equal(there.layers[name], layer)


@pytest.mark.usefixtures("quickly")
def test_a_store_that_goes_away_while_a_shard_is_read_is_named(out: UPath, s3: S3) -> None:
    synthesise(out, OPTIONS)
    file: Any = open_shard(out / "part-00000.parquet")
    s3.fail(slow_down=1)
    with pytest.raises(DataError, match=f"{out / 'part-00000.parquet'} cannot be reached in 8 attempts"):
        file.read_row_group(0)
    with pytest.raises(DataError, match=f"^{out / MANIFEST} cannot be reached in 8 attempts"):
        verify(out, VerifyOptions())
