"""The cluster's README: its commands name files and settings that exist, and every blank of the files is explained."""

import re
import subprocess
from pathlib import Path

import pytest

from mmearth_ray import settings
from mmearth_ray.config import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text()
COMMANDS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ").splitlines()
FILES = sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file() and path.suffix != ".pyc")


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:cluster|configs)/[\w./-]+\w", README))
    assert {"cluster/aws.yaml", "cluster/gcp.yaml", "cluster/slurm.sh", "configs/mmearth64_atto.yaml"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_file_of_the_folder_is_named() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES} - {"cluster/README.md"}
    assert [name for name in sorted(names) if name not in README] == []


def test_every_setting_that_is_named_exists() -> None:
    known = set(re.findall(r"^\s*([a-z]+\.[a-z_.0-9]+)", settings.help_text(Config), re.M))
    assert "train.workers" in known
    text = README + "".join(path.read_text() for path in FILES)
    used = set(re.findall(r"\b((?:train|data|run|checkpoint|model|optimizer)\.[a-z_]+)=", text))
    assert used
    assert sorted(used - known) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in (".yaml", ".sh")], ids=lambda path: path.name)
def test_every_blank_to_fill_in_is_in_the_readme(path: Path) -> None:
    content = "\n".join(line.split(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#"))
    blanks = set(re.findall(r"(?<![\$\w])(SHARED_FILE_SYSTEM|PROJECT|BUCKET|REGISTRY|HEAD|WORKER_\d|USER)\b", content))
    comments = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert [blank for blank in sorted(blanks) if blank not in README + comments] == []


def test_no_file_holds_a_secret() -> None:
    for path in [*FILES, ROOT / ".dockerignore"]:
        found = re.findall(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b|aws_secret_access_key\s*[:=]", path.read_text())
        assert found == [], path


def test_the_commands_are_shell() -> None:
    assert len(COMMANDS) > 20
    checked = subprocess.run(["bash", "-n"], input="\n".join(COMMANDS), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".sh"], ids=lambda path: path.name)
def test_scripts_are_shell_and_may_run(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert path.stat().st_mode & 0o111


def test_the_ray_of_the_readme_is_the_locked_one() -> None:
    (version,) = re.findall(r"^ray==(.*)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert f"**One Ray everywhere**: {version} with Python 3.11" in README
