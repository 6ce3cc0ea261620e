"""The image: what goes into it, and what must not."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
INSTRUCTIONS = [tuple(line.split(None, 1)) for line in LINES if line and not line.startswith("#")]
LOCK = (ROOT / "requirements.lock").read_text()


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves the path out: the last rule that matches it or a folder above it decides."""
    out = False
    parts = [path, *map(str, list(Path(path).parents)[:-1])]
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!").removeprefix("**/")
            candidates = [Path(part).name for part in parts] if rule.startswith("**/") else parts
            if any(fnmatch(candidate, pattern) for candidate in candidates):
                out = not rule.startswith("!")
    return out


def test_it_is_built_on_the_locked_ray_for_cpu_and_gpu() -> None:
    (version,) = re.findall(r"^ray==(.*)$", LOCK, re.M)
    assert arguments("FROM") == [f"rayproject/ray:{version}-py311-${{DEVICE}}"]
    assert arguments("ARG") == ["DEVICE=cpu", "DEVICE"]


def test_it_installs_the_lock_and_nothing_beside_it() -> None:
    installs = [command for command in arguments("RUN") if "pip install" in command]
    assert len(installs) == 2
    assert "-r requirements.lock" in installs[0]
    assert "--no-deps" in installs[1]


def test_it_does_not_run_as_root_and_holds_no_secret() -> None:
    assert arguments("USER")[-1] == "ray"
    text = "\n".join(line for line in LINES if not line.startswith("#"))
    assert not re.search(r"token|secret|password|access_key|credential", text, re.I)


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    copied = [path for rest in arguments("COPY") for path in rest.split() if not path.startswith("--")]
    sources = [path for path in copied if path != "./"]
    assert {"requirements.lock", "pyproject.toml", "mmearth_ray", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert not ignored("mmearth_ray/train/loop.py")


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "data/embedded/part-00000.parquet", "runs/first/config.yaml", ".env",
             "auth_token", "mmearth_ray/__pycache__/config.cpython-311.pyc"],
)  # fmt: skip
def test_data_environments_and_secrets_do_not(path: str) -> None:
    assert ignored(path)
