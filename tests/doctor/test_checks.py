"""The checks of a case without a cluster: what stands in the way of the run is found, and all else is looked at."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import S3
from tiny_earth import make_data_set

from mmearth_ray.config import load
from mmearth_ray.doctor import checks, machine
from mmearth_ray.doctor.case import Case
from mmearth_ray.doctor.checks import CHECKS
from mmearth_ray.doctor.findings import Check, Finding, examine
from mmearth_ray.doctor.judge import Nodes, Offer, size
from mmearth_ray.doctor.needs import count_weights, memory_of
from mmearth_ray.keys import Config

WITHOUT_RAY = [check for check in CHECKS if check.subject not in ("Ray", "room")]
OF_DISKS = [check for check in CHECKS if check.look in (checks.check_data, checks.check_machines, checks.check_disks)]


def small(*arguments: str) -> Config:
    return load(["model.image_size=16", "model.decoder_width=32", "model.targets=[aster]", *arguments])


def found(*arguments: str, looks: Sequence[Check[Case]] = WITHOUT_RAY) -> list[Finding]:
    """What the checks say that need no Ray, all of them unless told which."""
    return list(examine(Case(small(*arguments)), looks))


def of(findings: list[Finding], subject: str) -> Finding:
    (only,) = [finding for finding in findings if finding.subject == subject]
    return only


def test_a_machine_without_a_cluster_is_looked_at(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=48, held_out=8).directory
    run = tmp_path / "runs" / "one"
    findings = found(f"data.shards={data}", f"run.directory={run}", "train.workers=[1,2]", "train.steps=5")
    assert {finding.level for finding in findings if finding.subject != "all-reduce"} == {"ok"}
    assert of(findings, "data").text == "40 tiles to train on, 8 held out; 5 steps of 64 tiles"
    assert "1 to 2 workers with train.engine=ddp" in of(findings, "settings").text
    assert of(findings, "all-reduce") == ("warning", "all-reduce", "not checked: Ray is not there")
    assert f"{run}: 67.1 MB written at " in of(findings, "run.directory").text
    assert of(findings, "data.shards").text.startswith(f"{data}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_unwritable_run_directory_fails_alone(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    (tmp_path / "file").write_text("")
    findings = found(f"data.shards={data}", f"run.directory={tmp_path}/file/run")
    (failed,) = [finding for finding in findings if finding.level == "failed"]
    assert failed.subject == "run.directory"
    assert failed.text.startswith(f"cannot write {tmp_path}/file/run: ")
    assert of(findings, "data.shards").level == "ok"


def test_a_missing_bucket_fails_where_it_is_used_and_the_rest_is_looked_at(s3: S3, tmp_path: Path) -> None:
    findings = found("data.shards=s3://nowhere/earth", "checkpoint.directory=s3://nowhere/kept", f"run.directory={tmp_path}")
    failed = {finding.subject: finding.text for finding in findings if finding.level == "failed"}
    assert set(failed) == {"data", "checkpoints", "data.shards"}
    assert all("the bucket of s3://nowhere/" in text for text in failed.values())
    assert of(findings, "run.directory").level == "ok"
    assert not [finding for finding in findings if finding.subject == "disk"]  # checkpoints go elsewhere
    assert of(findings, "TMPDIR").level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_written_where_checkpoints_go_and_only_read_where_shards_are(s3: S3, tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    kept = f"{s3.make_bucket()}/kept"
    findings = found(f"data.shards={data}", f"checkpoint.directory={kept}", f"run.directory={tmp_path}")
    assert of(findings, "checkpoints").text.startswith(f"{kept}: 67.1 MB written at ")
    assert "written at" not in of(findings, "data.shards").text


def test_settings_that_pretrain_refuses_fail(s3: S3, tmp_path: Path) -> None:
    findings = found(f"data.shards={s3.make_bucket()}/x", "train.hang_timeout=20", f"run.directory={tmp_path}")
    assert of(findings, "settings").level == "failed"
    assert "train.hang_timeout=20: workers may wait longer" in of(findings, "settings").text


def test_an_embedded_data_set_that_is_still_to_be_made_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = found("data.shards=embedded")
    assert of(findings, "data.shards").text.startswith("not checked: pretrain makes the embedded data set in data/embedded")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_from_what_the_run_takes(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    findings = found(f"data.shards={data}", f"run.directory={tmp_path}", f"data.cache={tmp_path}/cache", "data.cache_gb=1e9")
    cache, writable = (finding for finding in findings if finding.subject == "data.cache")
    assert (cache.level, writable.level) == ("failed", "ok")
    assert "shards that are kept take 1,000,000,000.0 GB; free some" in cache.text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_checkpoints_that_are_there_already_take_no_further_room(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    given = [f"data.shards={data}", f"run.directory={tmp_path}", "checkpoint.keep=5", "train.steps=1000"]
    each = 12 * count_weights(small(*given))
    assert of(found(*given, looks=OF_DISKS), "disk").text.endswith(f", checkpoints take {size(6 * each)}")
    for step in (100, 200):
        place = tmp_path / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(bytes(each))
    assert of(found(*given, looks=OF_DISKS), "disk").text.endswith(
        f", checkpoints beside the 2 that are there take {size(4 * each)}"
    )
    given[2] = "checkpoint.keep=1"  # the next one is written before those are removed
    assert of(found(*given, looks=OF_DISKS), "disk").text.endswith(
        f", checkpoints beside the 2 that are there take {size(each)}"
    )


def test_checkpoints_that_are_all_kept_are_as_many_as_the_steps_come_to(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=48, held_out=8).directory
    given = [f"run.directory={tmp_path}/run", "checkpoint.keep=0", "checkpoint.every=1", "train.epochs=10"]
    each = 12 * count_weights(small(*given))
    steps = 7  # 10 epochs of 40 tiles are 400, of 64 each
    assert of(found(*given, f"data.shards={data}", looks=OF_DISKS), "disk").text.endswith(
        f", checkpoints take {size((steps + 1) * each)}"
    )
    default = found(*given[:3], f"data.shards={data}", looks=OF_DISKS)
    assert of(default, "disk").text.endswith(f", checkpoints take {size(301 * each)}")
    unknown = of(found(*given, f"data.shards={tmp_path}/nowhere", looks=OF_DISKS), "disk")
    assert unknown[::2] == ("warning", "not checked: how many steps train.epochs are is known of data sets that can be opened")


def test_a_url_that_cannot_be_used_fails_where_it_is_used_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    findings = found(f"data.shards={data}", f"run.directory={tmp_path}", "checkpoint.directory=s4://bucket/kept")
    failed = {finding.subject: finding.text for finding in findings if finding.level == "failed"}
    assert set(failed) == {"settings", "checkpoints"}
    assert all(text.startswith("checkpoint.directory=s4://bucket/kept: ") for text in failed.values())
    assert of(findings, "machines").level == of(findings, "memory").level == of(findings, "data").level == "ok"
    assert not [finding for finding in findings if finding.subject == "disk"]


def test_a_checkpoint_on_its_way_to_a_store_needs_room_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = small("checkpoint.directory=s3://bucket/kept")
    here = machine.look(machine.Wanted({}))
    scratch = here.disks[machine.SCRATCH]
    assert scratch.path == str(tmp_path)
    for spare, level in ((-1, "failed"), (0, "ok")):
        free = 3 * 4 * count_weights(config) + spare
        case = Case(config, nodes=[(replace(here, disks={machine.SCRATCH: scratch._replace(free=free)}), Offer(1))])
        (finding,) = checks.check_disks(case)
        assert finding[:2] == (level, "TMPDIR")
    case = Case(config, nodes=[(replace(here, disks={}), Offer(1))])
    assert [finding.level for finding in checks.check_disks(case)] == ["failed"]


def test_of_machines_that_say_nothing_nothing_is_said(tmp_path: Path) -> None:
    judging = [check for check in CHECKS if check.look in (checks.check_what_was_seen, checks.check_memory,
                                                           checks.check_object_store, checks.check_disks)]  # fmt: skip
    case = Case(small(f"run.directory={tmp_path}", f"data.cache={tmp_path}"), gpus=False)
    assert list(examine(case, judging)) == [
        ("warning", check.subject, "not checked: no machine told of itself") for check in judging
    ]
    assert len(judging) == 4


def test_activations_are_among_what_a_worker_takes(tmp_path: Path) -> None:
    config = small("train.micro_batch=64")
    taken = memory_of(config, 1, on_gpu=False)
    assert taken.activations > 0
    here = replace(machine.look(machine.Wanted({})), memory=int(taken.total - taken.activations / 2))
    for spare, level in ((0, "failed"), (int(taken.activations), "ok")):
        case = Case(config, nodes=[(replace(here, memory=here.memory + spare), Offer(1))])
        (finding,) = checks.check_memory(case)
        assert finding.level == level


def test_the_object_store_is_judged_by_the_data_set(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    case = Case(small(f"data.shards={data}"), gpus=False, nodes=[(machine.look(machine.Wanted({})), Offer(1, store=1e9))])
    looks = [Check("object store", checks.check_object_store), Check("data", checks.check_data)]
    before, _, after = examine(case, [*looks, looks[0]])
    assert before[::2] == ("warning", "not checked: what tiles take is known of data sets that can be opened")
    assert (after.level, "batches read ahead take up to " in after.text) == ("ok", True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data").directory
    (tmp_path / "file").write_text("")
    findings = found(
        f"data.shards={data}", f"run.directory={tmp_path}", f"data.cache={tmp_path}/file/cache", "data.cache_gb=0.001"
    )
    assert [finding.subject for finding in findings if finding.level == "failed"] == ["data.cache"]
    assert f"cannot write {tmp_path}/file/cache: " in findings[-2].text


def several(*arguments: str, monkeypatch: pytest.MonkeyPatch, lost: str = "") -> list[str]:
    """What is said of shared directories by two machines, of which the second lacks one of them."""

    def look_around(wanted: machine.Wanted) -> tuple[Nodes, dict[str, str]]:
        own = machine.look(wanted, "a")
        other = {folder: "is another one" if folder == lost else said for folder, said in own.unshared.items()}
        return [(own, Offer(1)), (replace(own, name="b", unshared=other), Offer(1))], {}

    monkeypatch.setattr(checks, "look_around", look_around)
    case = Case(small(*arguments), gpus=False)
    looks = [Check("machines", look) for look in (checks.check_machines, checks.check_what_was_seen)]
    return [f"{f.level} {f.text}" for f in examine(case, looks) if f.subject == "shared directory"]


def test_every_machine_must_see_the_run_the_checkpoints_and_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data_set(tmp_path / "data").directory
    run, kept = tmp_path / "run", tmp_path / "kept"
    given = [f"data.shards={data}", f"run.directory={run}", f"checkpoint.directory={kept}"]
    assert several(*given, monkeypatch=monkeypatch) == [
        f"ok {run} is seen and written by all (a, b)",
        f"ok {kept} is seen and written by all (a, b)",
        f"ok {data} is seen by all (a, b)",
    ]
    for lost in (run, kept, data):
        assert f"failed {lost}: is another one (b)" in several(*given, monkeypatch=monkeypatch, lost=str(lost))
    below = several(*given[:2], f"checkpoint.directory={run}/kept", monkeypatch=monkeypatch)
    assert [line.split()[1] for line in below] == [str(run), str(data)]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_run_directory_that_cannot_be_written_is_not_said_to_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    lines = several("data.shards=s3://nowhere/earth", f"run.directory={run}", monkeypatch=monkeypatch)
    assert lines == [f"warning {run}: not checked, for this command cannot use it (a, b)"]
