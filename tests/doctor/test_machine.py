"""What a machine says of itself, against what the system says."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mmearth_ray.doctor import machine
from mmearth_ray.doctor.machine import Shared, Wanted, digest_of, disk_of, look, read_gpu, versions


def test_the_machine_is_described(tmp_path: Path) -> None:
    found = look(Wanted({"run": tmp_path / "not" / "there"}), "here")
    assert found.name == "here"
    assert found.cores == len(os.sched_getaffinity(0))
    assert 1e8 < found.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert "+" not in "".join(found.versions.values())
    disk = found.disks["run"]
    assert disk.path == str(tmp_path)
    assert disk.total == shutil.disk_usage(tmp_path).total
    assert 0 < disk.free < disk.total
    assert not (tmp_path / "not").exists()


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "none"


def test_gpus_are_read_as_nvidia_smi_writes_them() -> None:
    gpu = read_gpu("NVIDIA L4, 23034, 8.9, 550.90.07")
    assert gpu == ("NVIDIA L4", 23034 << 20, 8.9, "550.90.07")
    assert read_gpu("NVIDIA GB10, [N/A], 12.1, 580.1").memory == 0


def test_nvidia_smi_is_asked_and_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == ()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'Tesla T4, 15360, 7.5, 535.1\\nTesla T4, 15360, 7.5, 535.1\\n'\n")
    tool.chmod(0o755)
    assert [gpu.capability for gpu in machine.gpus()] == [7.5, 7.5]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert machine.gpus() == ()


def test_a_directory_that_is_another_one_is_noticed_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    probe = tmp_path / ".probe"
    probe.write_text("word")
    wanted = Wanted({}, {"run": Shared(probe, digest_of(probe), written=True)})
    assert look(wanted).unshared == {"run": ""}
    probe.write_text("other")
    assert look(wanted).unshared["run"].startswith("does not see the .probe that this command sees there; put it on storage")
    assert [path.name for path in tmp_path.iterdir()] == [".probe"]
    probe.unlink()
    assert look(wanted).unshared["run"].startswith("does not see the .probe ")
    assert look(Wanted({})).unshared == {}


def test_a_directory_that_is_seen_must_be_written_to_only_where_the_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / "manifest.json"
    probe.write_text("word")
    shared = Shared(probe, digest_of(probe), written=True)

    def refuse(path: Path, text: str, encoding: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    found = look(Wanted({}, {"run": shared, "shards": shared._replace(written=False)})).unshared
    assert found["run"].startswith(f"cannot write {tmp_path}/manifest.json.")
    assert found["run"].endswith(": Permission denied; correct the permissions there")
    assert found["shards"] == ""


def test_a_disk_is_found_from_what_is_there(tmp_path: Path) -> None:
    assert disk_of(tmp_path / "a" / "b") == disk_of(tmp_path)
