"""What a kill leaves of an export."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from mmearth_ray.checkpoints.folder import EXPORTED
from mmearth_ray.files import complete_or_absent_folder
from mmearth_ray.train.outputs import clear_half_written


def contents(run: Path) -> dict[str, str]:
    return {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Ends a process where it is, for all that the folder's writer can tell."""


@pytest.mark.parametrize(("renamed", "left"), [(0, "old"), (1, "old"), (2, "new")])
def test_an_export_that_is_cut_off_leaves_the_one_before_or_the_new_one(
    renamed: int, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`renamed`: how many of its two renames were done: the old folder away, the new one into its place."""
    (tmp_path / EXPORTED).mkdir()
    (tmp_path / EXPORTED / "file").write_text("old")
    replace, done = Path.replace, 0

    def until(path: Path, target: Path) -> Path:
        nonlocal done
        if done == renamed:
            raise Killed
        done += 1
        return replace(path, target)

    def nothing(*_: object, **__: object) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", until)
        patch.setattr("mmearth_ray.files.shutil.rmtree", nothing)
        killed = pytest.raises(Killed) if renamed < 2 else nullcontext()
        with killed, complete_or_absent_folder(tmp_path / EXPORTED) as incoming:
            (incoming / "file").write_text("new")
    assert len(contents(tmp_path)) == 2
    clear_half_written(tmp_path)
    assert contents(tmp_path) == {f"{EXPORTED}/file": left}
