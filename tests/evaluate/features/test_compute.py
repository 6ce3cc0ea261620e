"""Features are computed once and kept: resumed, never mixed up, the same in this process and on Ray."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import BANDS, DIMS, tiny_encoder, tiny_statistics
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.task import Goal, Task, load_task
from mmearth_ray.evaluate.datasets.writing import Block, write_task
from mmearth_ray.evaluate.features import compute as features
from mmearth_ray.evaluate.features import part_jobs
from mmearth_ray.evaluate.features.compute import Features, compute
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.features.extraction import extractor
from mmearth_ray.evaluate.features.feeding import feed_of

STRETCH = 16
KILLED = """
import os, signal, sys
from pathlib import Path
from mmearth_ray.evaluate.features import parts as feature_parts
from mmearth_ray.evaluate.features import compute as features
from mmearth_ray.evaluate.features.encoders import open_subject
from mmearth_ray.evaluate.datasets.task import load_task

features.STRETCH = int(sys.argv[4])
write, written = feature_parts.pq.write_table, []

def write_half(table, path, **options):
    write(table, path, **options)
    written.append(path)
    if len(written) == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

feature_parts.pq.write_table = write_half
features.compute(open_subject(sys.argv[1]), load_task(Path(sys.argv[2])), "dataset", Path(sys.argv[3]), workers=0)
"""


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "STRETCH", STRETCH)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of the parts that are computed in this process."""
    rows: list[int] = []
    own = part_jobs.compute_part

    def counted(job: part_jobs.PartJob) -> None:
        rows.append(job.key.start)
        own(job)

    monkeypatch.setattr(part_jobs, "compute_part", counted)
    return rows


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return tiny_task(tmp_path / "task", images=70)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return open_subject(str(tiny_encoder(tmp_path / "encoder", statistics=tiny_statistics(BANDS))))


def matrix(found: Features) -> np.ndarray:
    assert found.matrix_ND is not None
    return found.matrix_ND


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_all_images_have_their_features_and_the_record_says_how(
    subject: Subject, task: Task, tmp_path: Path, computed: list[int]
) -> None:
    said: list[str] = []
    found = compute(subject, task, "dataset", tmp_path / "a" / "cache", workers=0, show=said.append)
    extract = extractor(subject, feed_of(subject, task.info, "dataset"), Goal.SINGLE, torch.device("cpu"))
    np.testing.assert_allclose(matrix(found), extract(task.images(range(70))), rtol=1e-4, atol=1e-5)
    assert (matrix(found).dtype, matrix(found).shape, found.width) == (np.float32, (70, DIMS[-1]), DIMS[-1])
    assert found.ids.tolist() == task.ids.tolist()
    assert computed == [0, 16, 32, 48, 64]
    assert said[-1] == "encoder: features of 70 of 70 images"
    assert found.folder.name == f"{subject.digest[:16]}-{task.info.digest[:16]}-dataset"
    record = json.loads((found.folder / "features.json").read_text())
    assert record["subject"]["digest"] == subject.digest
    assert record["task"] == {"name": task.info.name, "digest": task.info.digest, "goal": "single-label", "images": 70}
    assert (record["normalisation"], record["feed"]["absent"], record["shape"]) == ("dataset", [], [DIMS[-1]])
    assert (record["threads"], record["clock"], record["parts"]) == (1, "cpu", 5)
    assert record["seconds"] == pytest.approx(70 * record["seconds_per_image"])
    assert found.seconds_per_image > 0


def test_what_is_there_is_not_computed_again(subject: Subject, task: Task, tmp_path: Path, computed: list[int]) -> None:
    first = compute(subject, task, "dataset", tmp_path / "c", workers=0)
    record = (first.folder / "features.json").stat().st_mtime_ns
    again = compute(replace(subject, name="by another name"), load_task(task.folder), "dataset", tmp_path / "c", workers=0)
    assert len(computed) == 5
    assert np.array_equal(matrix(again), matrix(first))
    assert again.seconds == first.seconds
    assert (first.folder / "features.json").stat().st_mtime_ns == record


@pytest.mark.parametrize("content", [None, "{", "[]", '{"subject": {"digest": "of another"}}'])
def test_a_record_that_is_not_whole_is_written_anew(
    subject: Subject, task: Task, tmp_path: Path, computed: list[int], content: str | None
) -> None:
    path = compute(subject, task, "dataset", tmp_path / "c", workers=0).folder / "features.json"
    record = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    compute(subject, task, "dataset", tmp_path / "c", workers=0)
    assert path.read_text() == record
    assert len(computed) == 5


@pytest.mark.parametrize("how", ["removed", "cut", "flipped", "another's", "of other images"])
def test_only_parts_that_are_missing_or_wrong_are_computed(
    subject: Subject, task: Task, tmp_path: Path, computed: list[int], how: str
) -> None:
    first = compute(subject, task, "dataset", tmp_path / "c", workers=0)
    path = first.folder / "part-00002.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(matrix(first)[40].tobytes())] ^= 1
    other = compute(open_subject("twin:1:" + subject.spec), task, "dataset", tmp_path / "c", workers=0)
    computed.clear()
    {
        "removed": path.unlink,
        "cut": lambda: path.write_bytes(path.read_bytes()[:-100]),
        "flipped": lambda: path.write_bytes(content),
        "another's": lambda: path.write_bytes((other.folder / path.name).read_bytes()),
        "of other images": lambda: path.write_bytes((first.folder / "part-00001.parquet").read_bytes()),
    }[how]()
    again = compute(subject, task, "dataset", tmp_path / "c", workers=0)
    assert computed == [32]
    assert np.array_equal(matrix(again), matrix(first))


def test_encoders_data_sets_and_normalisations_share_a_cache_and_nothing_else(
    subject: Subject, task: Task, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    other = open_subject(str(tiny_encoder(tmp_path / "other", seed=1, statistics=tiny_statistics(BANDS))))
    newer = tiny_task(tmp_path / "newer", images=70, seed=1)
    cases = [(subject, task, "dataset"), (other, task, "dataset"), (subject, newer, "dataset"), (subject, task, "pretraining")]
    found = [matrix(compute(*case, cache, workers=0)) for case in cases]
    assert len(folders(cache)) == 4
    assert all(not np.allclose(a, b, rtol=1e-2) for i, a in enumerate(found) for b in found[:i])
    for case, expected in zip(cases, found, strict=True):
        assert np.array_equal(matrix(compute(*case, cache, workers=0)), expected)


def test_the_order_of_bands_in_a_data_set_changes_nothing(task: Task, tmp_path: Path) -> None:
    subject = open_subject(str(tiny_encoder(tmp_path / "e", ("B4", "B8", "B2"))))
    order = np.random.default_rng(2).permutation(12)
    info = replace(task.info, bands=tuple(BANDS[i] for i in order))
    rows = range(len(task))
    block = Block(task.ids.tolist(), task.split.tolist(), task.fold, task.labels(rows), task.images(rows)[:, order])
    write_task(tmp_path / "permuted", info, [block])
    permuted = load_task(tmp_path / "permuted")
    for each in (subject, open_subject("statistics")):
        one, other = (matrix(compute(each, t, "dataset", tmp_path / "c", workers=0)) for t in (task, permuted))
        assert np.array_equal(one, other)
        assert len(np.unique(one.round(3), axis=0)) == 70


def test_maps_are_kept_for_every_image_and_read_when_asked_for(subject: Subject, tmp_path: Path, computed: list[int]) -> None:
    task = tiny_task(tmp_path / "s", Goal.SEGMENTATION, images=40, size=20)
    found = compute(subject, task, "dataset", tmp_path / "c", workers=0)
    assert (found.matrix_ND, found.shape) == (None, (3, 3, DIMS[-1]))
    rows = np.array([39, 3, 3, 17, 0])
    extract = extractor(subject, feed_of(subject, task.info, "dataset"), Goal.SEGMENTATION, torch.device("cpu"))
    np.testing.assert_allclose(found.grids(rows), extract(task.images(rows)), rtol=2e-3, atol=2e-3)
    assert found.grids(rows).dtype == np.float16
    assert found.grids([]).shape == (0, 3, 3, DIMS[-1])
    compute(subject, task, "dataset", tmp_path / "c", workers=0)
    assert computed == [0, 16, 32]
    plain = compute(open_subject("statistics"), task, "pretraining", tmp_path / "c", workers=0)
    assert (plain.shape, plain.feed.normalisation) == ((3, 3, 12), "dataset")


def test_killed_in_the_middle_of_writing_it_goes_on_from_there(task: Task, tmp_path: Path, computed: list[int]) -> None:
    cache, spec = tmp_path / "c", str(tiny_encoder(tmp_path / "e"))
    arguments = [spec, str(task.folder), str(cache), str(STRETCH)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    (folder,) = cache.iterdir()
    (half,) = folder.glob(".part-00002*.tmp")
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["part-00000.parquet", "part-00001.parquet"]
    os.utime(half, (0, 0))  # long ago
    said: list[str] = []
    found = compute(open_subject(spec), task, "dataset", cache, workers=0, show=said.append)
    assert computed == [32, 48, 64]
    assert said[0] == "e: 2 of 5 parts of features were there already"
    assert not list(folder.glob(".*"))
    whole = compute(open_subject(spec), task, "dataset", tmp_path / "other", workers=0)
    assert np.array_equal(matrix(found), matrix(whole))


def test_features_that_are_no_numbers_are_refused_and_not_kept(task: Task, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "e")
    state = load_file(folder / "encoder.safetensors")
    name = "stages.3.0.pwconv2.bias"
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, folder / "encoder.safetensors")
    with pytest.raises(DataError, match=r"encoder 'mine' gives features of image image-000 \(.*split 'train'\)"):
        compute(open_subject(str(folder), "mine"), task, "dataset", tmp_path / "c", workers=0)
    (place,) = (tmp_path / "c").iterdir()
    assert not list(place.iterdir())


def test_a_data_set_that_was_replaced_on_the_way_is_refused(subject: Subject, task: Task, tmp_path: Path) -> None:
    tiny_task(task.folder, images=70, seed=1)
    with pytest.raises(DataError, match="is no longer the data set that it was"):
        compute(subject, task, "dataset", tmp_path / "c", workers=0)


def test_wrong_arguments_are_refused(subject: Subject, task: Task, tmp_path: Path) -> None:
    for batch, threads, workers in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(UsageError, match="must be 1 or more"):
            compute(subject, task, "dataset", tmp_path / "c", workers=workers, batch=batch, threads=threads)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="PyTorch finds no GPU"):
            compute(subject, task, "dataset", tmp_path / "c", workers=0, gpus=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        compute(subject, task, "dataset", tmp_path / "file", workers=0)


def test_on_ray_the_same_parts_come_out_and_errors_stay_one_line(
    subject: Subject, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = compute(subject, task, "dataset", tmp_path / "inline", workers=0)
    monkeypatch.chdir(tmp_path)
    relative = replace(task, folder=Path("task"))
    found = compute(subject, relative, "dataset", Path("ray"), workers=2)
    assert np.array_equal(matrix(found), matrix(inline))
    assert (found.seconds > 0, found.threads) == (True, 1)
    tiny_encoder(tmp_path / "encoder", seed=5)
    with pytest.raises(DataError, match="are no longer those that it was opened with") as caught:
        compute(subject, relative, "pretraining", Path("ray"), workers=None)
    assert "\n" not in str(caught.value)
