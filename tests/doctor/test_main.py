"""The command as people run it: errors in one line, and a real Ray with a real all-reduce of two workers."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command import environment
from tiny_earth import make_data_set

from mmearth_ray.doctor.__main__ import main
from mmearth_ray.errors import run_command


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.worker=2", "error: train.worker=2: there is no key 'train.worker'; did you mean train.workers?"),
        ("train.workers=0", "error: train.workers=[0]: must be at least 1"),
        ("absent.yaml", "error: cannot read the configuration absent.yaml: No such file or directory"),
        ("--gpus", "error: '--gpus' is not understood; settings are key=value"),
    ],
)
def test_wrong_words_are_answered_as_pretrain_answers_them(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [argument]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "  train.workers=[1]" in capsys.readouterr().out


def test_a_python_without_ray_is_said_to_lack_it(tmp_path: Path) -> None:
    program = """
import sys
from mmearth_ray.doctor import machine
sys.modules |= {"ray": None, "upath": None}
machine.PACKAGES = (*machine.PACKAGES, "no-such-package")
found = machine.versions
machine.versions = lambda: {**found(), "ray": "none"}
from mmearth_ray.doctor.__main__ import entry
sys.exit(entry())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.split(maxsplit=2) == [
        "failed", "versions", "ray and no-such-package: not installed here; install requirements.lock\n",
    ]  # fmt: skip


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmearth_ray.doctor", *arguments],
        capture_output=True, text=True, timeout=300, check=False, env={**environment(), **variables},
    )  # fmt: skip


def test_a_run_of_two_workers_is_checked_with_a_real_ray_and_nothing_stays(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=48).directory
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as own:  # a short path: sockets lie below it
        done = doctor("train.workers=2", "model.image_size=16", f"data.shards={data}", f"run.directory={tmp_path}/run",
                      RAY_TMPDIR=own, RAY_ADDRESS="local")  # fmt: skip
        assert [path for path in Path(own).rglob("session_*") if path.is_dir()] == []
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[9:].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "right on 2 workers on 1 machine (CPU, gloo): 67.1 MB in " in lines["all-reduce"]
    assert "2 workers on CPUs, data tasks of each have " in lines["room"]
    assert f"python {sys.version.split()[0]}" in lines["versions"]
    assert done.stdout.splitlines()[-1].startswith("0 failed, ")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_cluster_that_is_not_there_fails_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=48).directory
    done = doctor("model.image_size=16", f"data.shards={data}", f"run.directory={tmp_path}", RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 1
    assert "failed   Ray              cannot join the Ray cluster at 127.0.0.1:1 (" in done.stdout
    assert "warning  all-reduce       not checked: Ray is not there" in done.stdout
    assert "ok       data.shards      " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
