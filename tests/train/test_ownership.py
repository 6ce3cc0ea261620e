"""One run to a folder of checkpoints, and of its commands the latest."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray import config as configuration
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.experiment import Experiment, open_experiment
from mmearth_ray.files import atomic_text
from mmearth_ray.keys import Config
from mmearth_ray.storage import Location, locate, read_bytes, remove
from mmearth_ray.train import checkpoint, commit
from mmearth_ray.train.commit import Keeping, begin
from mmearth_ray.train.ownership import OWNER, RUN, check_owner, claim, require_claim, run_id, take_over


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return tmp_path / "kept" / "first"
    s3: S3 = request.getfixturevalue("s3")
    return locate(f"{s3.make_bucket()}/first", "checkpoint.directory")


def config_of(run: Path, *arguments: str) -> Config:
    return configuration.load([f"run.directory={run}", "model.image_size=32", *arguments])


def experiment_of(tmp_path: Path, folder: Location, command: str) -> Experiment:
    data = tmp_path / "data"
    if not data.exists():
        make_data_set(data, tiles=18, size=32)
    config = config_of(tmp_path / "run", f"checkpoint.directory={folder}")
    return dataclasses.replace(open_experiment(config, data), claim=command)


def test_the_id_is_drawn_once_set_or_remembered(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    drawn = {run_id(config) for _ in range(20)}
    assert len(drawn) == 20
    assert all(re.fullmatch("[0-9a-f]{8}", name) for name in drawn)
    assert run_id(config_of(tmp_path, "run.id=first")) == "first"
    for damaged in ("", "[]", '{"versions": {}}'):  # the last is an earlier version's
        (tmp_path / RUN).write_text(damaged)
        assert run_id(config) not in drawn
    (tmp_path / RUN).write_text('{"run": "second"}')
    assert run_id(config) == run_id(config_of(tmp_path, "run.id=second")) == "second"
    said = f"run.id=first: {tmp_path} is the directory of the run second; set it back, or use another run.directory"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        run_id(config_of(tmp_path, "run.id=first"))


def test_another_run_is_turned_away_with_the_way_to_go_on(folder: Location) -> None:
    check_owner(folder, "one")
    claim(folder, "one", "/runs/one")
    check_owner(folder, "one")
    said = rf"^the checkpoints in {folder} are those of the run one \(/runs/one on .*\); give this run a checkpoint.directory "
    said += "of its own, or go on with that one from here by run.id=one$"
    for call in (lambda: check_owner(folder, "two"), lambda: claim(folder, "two", "/runs/two")):
        with pytest.raises(UsageError, match=said):
            call()
    claim(folder, "one", "/elsewhere/one")


def test_of_the_commands_of_a_run_the_latest_keeps_the_folder(folder: Location, tmp_path: Path) -> None:
    first = experiment_of(tmp_path, folder, claim(folder, "one", "/runs/one"))
    require_claim(first)
    second = dataclasses.replace(first, claim=claim(folder, "one", "/elsewhere/one"))
    require_claim(second)
    said = rf"^{folder} was claimed by another command while this one trained \(run one, /elsewhere/one on .*\); this one "
    with pytest.raises(DataError, match=said):
        require_claim(first)
    remove(folder / OWNER)
    with pytest.raises(DataError, match=f"{folder / OWNER} was removed while this run trained; run the command again"):
        require_claim(second)
    require_claim(dataclasses.replace(first, claim=""))


def test_of_the_groups_of_a_command_the_latest_keeps_the_folder(folder: Location, tmp_path: Path) -> None:
    first = experiment_of(tmp_path, folder, claim(folder, "one", "/runs/one"))
    second = take_over(first)
    require_claim(second)
    third = take_over(second)
    said = f"^{folder} was taken over by a later group of this run's workers while these were out of reach; these save"
    for late in (first, second):
        for call in (require_claim, take_over):
            with pytest.raises(DataError, match=said):
                call(late)
    require_claim(third)
    claim(folder, "one", "/elsewhere/one")
    with pytest.raises(DataError, match="was claimed by another command while this one trained"):
        take_over(third)
    assert take_over(dataclasses.replace(first, claim="")).claim == ""


def test_an_owner_of_an_earlier_version_is_that_of_a_first_group(folder: Location, tmp_path: Path) -> None:
    first = experiment_of(tmp_path, folder, claim(folder, "one", "/runs/one"))
    owner = json.loads(read_bytes(folder / OWNER))
    assert owner.pop("group") == 0
    atomic_text(folder / OWNER, json.dumps(owner))
    require_claim(first)


@pytest.mark.parametrize("when", ["before", "while it writes"])
def test_a_group_that_was_succeeded_commits_nothing(
    when: str, folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = experiment_of(tmp_path, folder, claim(folder, "one", "/runs/one"))

    def save(experiment: Experiment, step: int) -> None:
        state = checkpoint.State(step, step * 8, {}, {}, {})
        weights = {"w": torch.full((3,), float(step))}
        begin(folder, state, weights, {}, Keeping(keep=2, check=lambda: require_claim(experiment))).commit()

    save(first, 3)
    write, following = commit.write_parts, []

    def overtaken(*arguments: Any) -> None:
        write(*arguments)
        following.append(take_over(first))

    if when == "before":
        following.append(take_over(first))
    else:
        monkeypatch.setattr(commit, "write_parts", overtaken)
    with pytest.raises(DataError, match="was taken over by a later group of this run's workers"):
        save(first, 6)
    monkeypatch.setattr(commit, "write_parts", write)
    assert [path.name for path in checkpoint.committed(folder)] == ["step-00000003"]
    checkpoint.clear_incoming(folder)
    save(following[0], 6)
    with checkpoint.opened(checkpoint.committed(folder)[-1]) as (weights, _):
        assert weights["w"].tolist() == [6, 6, 6]


def test_a_store_that_denies_the_owner_is_not_taken_for_damage(s3: S3) -> None:
    folder = locate(f"{s3.make_bucket()}/first", "checkpoint.directory")
    s3.fail(denied=1.0)
    with pytest.raises(DataError, match=f"^{folder / OWNER}: access denied"):
        check_owner(folder, "one")


def test_an_owner_that_cannot_be_read_or_written_is_named(folder: Location, tmp_path: Path) -> None:
    claim(folder, "one", "/runs/one")
    for damaged in ("{", "[]", json.dumps({"run": "one"})):
        atomic_text(folder / OWNER, damaged)
        with pytest.raises(DataError, match=rf"^{folder / OWNER} cannot be read \(.*\); remove it if no other run keeps"):
            check_owner(folder, "one")
    remove(folder / OWNER)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"^{tmp_path / 'file' / 'x' / OWNER} cannot be read \(Not a directory\)$"):
        claim(tmp_path / "file" / "x", "one", "/runs/one")
