"""Files and folders appear complete or not at all, and failures say what to do."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.files import atomic_text, complete_or_absent_folder, locked, write_failure


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_text_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_text(path, "old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(DataError, match="no space left on the disk"):
        atomic_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_failures_say_what_to_do() -> None:
    assert "free some" in write_failure(Path("/d/x"), OSError(errno.EDQUOT, "quota"))
    denied = PermissionError(errno.EACCES, "Permission denied")
    assert write_failure(Path("/d/x"), denied) == "cannot write /d/x: Permission denied"


def _write(folder: Path, divisor: int) -> None:
    with complete_or_absent_folder(folder) as incoming:
        (incoming / "half").write_text("half")
        (incoming / "rest").write_text(str(1 / divisor))


def _only_out_of_the_way(folder: Path) -> Callable[[Path, Path], Path]:
    """A `Path.replace` that fails once, when the new folder is to take the name."""
    rename, failed = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if target == folder and not failed:
            failed.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    return replace


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with complete_or_absent_folder(folder) as incoming:
            (incoming / text).write_text(text)
            assert not (folder / text).exists()
        assert [p.name for p in folder.iterdir()] == [text]
    with pytest.raises(ZeroDivisionError):
        _write(folder, 0)
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(DataError, match="no space left"):
        _write(folder, 1)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", _only_out_of_the_way(folder))
    with pytest.raises(DataError, match="cannot write"):
        _write(folder, 1)
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_one_commands_until_that_ends_however_it_does(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    with suppress(ZeroDivisionError), locked(folder, "is training in", "run.directory"):
        with pytest.raises(UsageError, match=f"another command is training in {folder}; wait for it, or use another run.direc"):
            _hold(folder)
        raise ZeroDivisionError
    _hold(folder)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        _hold(tmp_path / "file")


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_disk_without_locks_is_used_all_the_same(
    number: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    if goes_on:
        _hold(tmp_path)
    else:
        with pytest.raises(DataError, match="cannot write"):
            _hold(tmp_path)


def _hold(folder: Path) -> None:
    with locked(folder, "is training in", "run.directory"):
        pass
