"""How checkpoints come about: begun by all workers between two steps, committed when all of their files are in place.

In a directory they are written under `.incoming/`, as fast as the disk takes them, and renamed.  A store is slower than a disk:
what is meant for one is written to a scratch folder and uploaded while training goes on; the state, which makes it a
checkpoint, follows when every worker's files have arrived.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from upath import UPath

from mmearth_ray.checkpoints.folder import CHECKPOINT_FILE, INDEX, STATE, save_tensors
from mmearth_ray.copies import scratch, upload
from mmearth_ray.errors import DataError
from mmearth_ray.files import flush, write_failure
from mmearth_ray.storage import Location
from mmearth_ray.train.checkpoint import INCOMING, MOMENTS_FILE, State, checkpoint_path, committed, step_of, take_away
from mmearth_ray.train.parts import LIMIT, Team, index_of, write_parts


@dataclass(frozen=True)
class Keeping:
    """Who keeps checkpoints, and which.

    All but the newest `keep` (0: none) and those of every `keep_every` steps are removed.  `check` raises DataError where this
    team may not save: the first worker asks before anything is touched and again before the commit.  `mark` is the team's own,
    so that no other writes where it does before the commit.
    """

    keep: int = 0
    keep_every: int = 0
    team: Team = Team()
    check: Callable[[], object] = lambda: None
    mark: str = ""


class Begun(ABC):
    """A checkpoint whose tensors are written or on their way.  Every worker of the team holds one and calls its methods.

    What was committed before stays as it is, whatever fails: the disk or the store that does not take it raises DataError.
    """

    def __init__(self, final: Location, state: State, tensors_of: Mapping[str, Mapping[str, Tensor]], keeping: Keeping) -> None:
        self.final, self.keeping, self.team = final, keeping, keeping.team
        indices = {file + INDEX: index_of(file, tensors, LIMIT) for file, tensors in tensors_of.items()}
        self.texts = {file: text for file, text in indices.items() if text} | {STATE: json.dumps(vars(state), indent=1)}
        with self.team.together(final):
            if self.team.rank == 0:
                keeping.check()

    @abstractmethod
    def arrived(self) -> bool:
        """Whether the files of this worker are in place, or never will be."""

    @abstractmethod
    def close(self) -> None:
        """Give up what has not arrived."""

    @abstractmethod
    def _commit(self) -> None: ...

    def commit(self) -> Location:
        """Wait for all files, make them a checkpoint and remove those that are not kept."""
        self._commit()
        if self.keeping.keep and self.team.rank == 0:
            with suppress(OSError, DataError):
                for old in committed(self.final.parent)[: -self.keeping.keep]:
                    if not self.keeping.keep_every or step_of(old) % self.keeping.keep_every:
                        take_away(old)
        return self.final

    def _write_texts(self, folder: Path) -> list[Path]:
        """Write what is no tensors, and return it; the state comes last."""
        for file, text in self.texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        return [folder / file for file in self.texts]


class _InDirectory(Begun):
    """Everything is in place, under a name that is no checkpoint's, before it is there."""

    def __init__(self, final: Path, state: State, tensors_of: Mapping[str, Mapping[str, Tensor]], keeping: Keeping) -> None:
        super().__init__(final, state, tensors_of, keeping)
        self.incoming = final.parent / INCOMING / ".".join(filter(None, (final.name, keeping.mark)))
        self.place = final
        with ExitStack() as stack:
            stack.callback(self.close)
            with self.team.together(final):
                if self.team.rank == 0:
                    shutil.rmtree(self.incoming, ignore_errors=True)
                    self.incoming.mkdir(parents=True)
            with self.team.together(final):
                write_parts(tensors_of, self.team, self._put, LIMIT)
            stack.pop_all()

    def _put(self, file: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, self.incoming / file)
        flush(self.incoming / file)

    def arrived(self) -> bool:
        return True

    def _commit(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.close)
            with self.team.together(self.final):
                if self.team.rank == 0:
                    for path in self._write_texts(self.incoming):
                        flush(path)
                    flush(self.incoming)
                    self.keeping.check()
                    take_away(self.place)
                    self.incoming.replace(self.place)
                    flush(self.place.parent)

    def close(self) -> None:
        if self.team.rank == 0:
            shutil.rmtree(self.incoming, ignore_errors=True)


class _OnStore(Begun):
    """The tensors are in a scratch folder, from where a thread uploads one file after the other."""

    def __init__(self, final: UPath, state: State, tensors_of: Mapping[str, Mapping[str, Tensor]], keeping: Keeping) -> None:
        super().__init__(final, state, tensors_of, keeping)
        self.place = final
        self.uploads: list[Future[None]] = []
        self.held = ExitStack()
        with ExitStack() as stack:
            stack.callback(self.close)
            with self.team.together(final):
                if self.team.rank == 0:
                    take_away(final)
            with self.team.together(final):
                self.scratch = self.held.enter_context(scratch())
                self.thread = ThreadPoolExecutor(1, "checkpoint")
                self.held.callback(self.thread.shutdown, wait=False, cancel_futures=True)
                write_parts(tensors_of, self.team, self._put, LIMIT)
            stack.pop_all()

    def _put(self, file: str, tensors: dict[str, Tensor]) -> None:
        with self._writing(file):
            save_tensors(tensors, self.scratch / file)
        self.uploads.append(self.thread.submit(self._upload, file))

    @contextmanager
    def _writing(self, file: str) -> Iterator[None]:
        """A failure here is one of the scratch folder, not of the store."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{write_failure(self.scratch / file, error)}, on its way to {self.place}") from error

    def _upload(self, file: str) -> None:
        if any(before.done() and before.exception() for before in self.uploads):
            return
        self.keeping.check()  # here everyone writes to the same names
        upload(self.scratch / file, self.place / file)
        (self.scratch / file).unlink()

    def arrived(self) -> bool:
        return all(uploaded.done() for uploaded in self.uploads)

    def _commit(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.close)
            with self.team.together(self.final):
                for uploaded in self.uploads:
                    uploaded.result()
            with self.team.together(self.final):
                if self.team.rank == 0:
                    self.keeping.check()
                    with self._writing(STATE):
                        texts = self._write_texts(self.scratch)
                    for path in texts:
                        upload(path, self.place / path.name)

    def close(self) -> None:
        self.held.close()


def begin(
    folder: Location, state: State, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], keeping: Keeping
) -> Begun:
    """Begin a checkpoint: when this returns, the tensors may change.  All workers of the team call it.

    Raises DataError if the disk or the store does not take it, or the team may not save.
    """
    final = checkpoint_path(folder, state.step)
    tensors_of = {CHECKPOINT_FILE: weights, MOMENTS_FILE: moments}
    kind = _InDirectory if isinstance(final, Path) else _OnStore
    return kind(final, state, tensors_of, keeping)  # pyright: ignore[reportArgumentType]
