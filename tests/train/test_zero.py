"""The loop with a model in parts on two workers: validation, figures and checkpoints on a store are those of a whole model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import losses, metrics
from groups import in_a_group
from processes import Quiet, local_stream, settings
from s3_server import S3
from tiny_checkpoint import load_tensors
from tiny_earth import make_data_set
from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import open_experiment
from mmearth_ray.storage import Location, locate, names
from mmearth_ray.train import commit, loop, zero
from mmearth_ray.train.checkpoint import checkpoint_path, committed, step_of
from mmearth_ray.train.loop import Worker, run

LIMIT = 3_000_000
"""Bytes of a checkpoint's file: of the tiny model's 13 MB there are several."""

RECIPE = (
    "optimizer.lr=1e-3",
    "checkpoint.every=2",
    "checkpoint.keep=0",
    "validate.every=2",
    "figure.every=2",
    "figure.tiles=3",
)
PARTED = ("train.engine=zero3", "train.workers=2", "train.micro_batch=2")
REFUSED = "model-00002-of"
"""A file that the second of two workers writes."""


def train(rank: int, workers: int, shards: Path, folder: Path, arguments: tuple[str, ...]) -> None:
    """A run of the loop that leaves `said-RANK` if it fails, and of its figure the predictions that it shows."""
    zero.KEPT_WHOLE, commit.LIMIT = 0, LIMIT
    drawn = loop.draw_reconstructions

    def recorded(experiment: Any, batch: Any, shown: Mapping[str, Mapping[str, Tensor]], step: int) -> Path:
        arrays = {name: parts["prediction"].numpy() for name, parts in shown.items()}
        np.savez(folder / "shown.npz", **arrays)  # pyright: ignore[reportArgumentType]
        return drawn(experiment, batch, shown, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_reconstructions", recorded)
        folder.mkdir(parents=True, exist_ok=True)
        experiment = open_experiment(settings(shards, folder, *RECIPE, *arguments), shards)
        try:
            run(experiment, Worker(rank, workers, torch.device("cpu"), 1), local_stream, Quiet())
        except DataError as error:
            (folder / f"said-{rank}").write_text(str(error))


def both(rank: int, workers: int, shards: Path, folder: Path, bucket: str) -> None:
    job = partial(train, rank, workers, shards)
    job(folder / "kept", (*PARTED, f"checkpoint.directory={bucket}/kept"))
    job(folder / "refused", (*PARTED, f"checkpoint.directory={bucket}/refused", "figure.tiles=0", "validate.tiles=0"))


@pytest.fixture(scope="module")
def runs(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs `whole` (ddp, one worker, in a directory), `kept` and `refused` (in parts, on a store), and the bucket of these."""
    folder = tmp_path_factory.mktemp("runs")
    shards = folder / "tiny"
    make_data_set(shards, tiles=26, size=40, held_out=5)
    bucket = s3_server.make_bucket()
    s3_server.fail(denied=1.0, only=f"^(PUT|POST) /.*/refused/.*{REFUSED}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        patch.setattr(zero, "KEPT_WHOLE", zero.KEPT_WHOLE)
        patch.setattr(commit, "LIMIT", commit.LIMIT)
        in_a_group(2, folder, both, shards, folder, bucket)
        train(0, 1, shards, folder / "whole", ())
    return folder, bucket


@pytest.fixture
def kept(runs: tuple[Path, str], s3: S3) -> Location:
    return locate(f"{runs[1]}/kept", "checkpoint.directory")


def test_losses_and_validation_are_those_of_a_whole_model(runs: tuple[Path, str]) -> None:
    found, expected = metrics(runs[0] / "kept"), metrics(runs[0] / "whole")
    assert losses(runs[0] / "kept") == pytest.approx(losses(runs[0] / "whole"), rel=1e-5)
    validated = [entry["step"] for entry in found if "validation" in entry]
    assert validated == [entry["step"] for entry in expected if "validation" in entry] == [2, 4]
    for step in validated:
        ours, theirs = found[step - 1]["validation"], expected[step - 1]["validation"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert ours["coverage"] == theirs["coverage"]


def test_the_figure_at_the_end_shows_the_same(runs: tuple[Path, str]) -> None:
    ours, theirs = (np.load(runs[0] / name / "shown.npz") for name in ("kept", "whole"))
    assert ours.files == theirs.files
    assert len(ours.files) > 5
    for target in theirs.files:
        spread = float(np.abs(theirs[target]).max())
        assert np.allclose(ours[target], theirs[target], rtol=0, atol=1e-4 * spread), target
    assert (runs[0] / "kept" / "figures" / "reconstruction-00000004.png").stat().st_size > 10_000


def test_workers_upload_several_parts_side_by_side(runs: tuple[Path, str], kept: Location) -> None:
    assert [step_of(path) for path in committed(kept)] == [2, 4]
    files = names(checkpoint_path(kept, 4))
    for kind in ("model", "optimizer"):
        parts = sorted(name for name in files if name.startswith(f"{kind}-"))
        assert len(parts) >= 4
        assert parts == [f"{kind}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    whole = load_tensors(checkpoint_path(runs[0] / "whole" / "checkpoints", 4))
    for found, expected in zip(load_tensors(checkpoint_path(kept, 4)), whole, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-3 * float(value.norm()) + 1e-6, name


def test_what_the_store_takes_of_one_worker_alone_ends_all_with_the_same_words(runs: tuple[Path, str], s3: S3) -> None:
    first, second = ((runs[0] / "refused" / f"said-{rank}").read_text() for rank in range(2))
    assert first == second
    assert REFUSED in first
    assert f"{runs[1]}/refused/step-00000002" in first
    assert committed(locate(f"{runs[1]}/refused", "checkpoint.directory")) == []
    assert not (runs[0] / "kept" / "said-0").exists()
