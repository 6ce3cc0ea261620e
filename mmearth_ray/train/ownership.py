"""Who keeps checkpoints in a folder: one run, and of its commands the latest.

`owner.json` beside the checkpoints names the run by its id (`run.id`, or one that was drawn once and is remembered in the run
directory), the command that writes them, and which of its groups of workers does.  Another run is turned away before anything
starts.  Workers look again before they restore, before they save and before they commit, so that of two commands that began at
the same moment, or of a group that lives on unseen on machines that were given up, only what came last goes on.
"""

import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.experiment import Experiment
from mmearth_ray.files import atomic_text, write_failure
from mmearth_ray.keys import Config
from mmearth_ray.patience import Absent
from mmearth_ray.storage import Location, read_bytes
from mmearth_ray.train.checkpoint import directory_of

OWNER = "owner.json"
RUN = "run.json"
"""In the run directory: what the run is, its id among it."""


@dataclass(frozen=True)
class Owner:
    """Whose a folder of checkpoints is.

    `command` is drawn anew by each command, `group` counts its groups of workers; directory, host and time are for people.
    """

    run: str
    command: str
    directory: str
    host: str
    since: str
    group: int = 0

    @property
    def claim(self) -> str:
        """What the group is known by."""
        return f"{self.command}/{self.group}"


def run_id(config: Config) -> str:
    """The id of the run: as set, as its directory remembers it, or a new one.

    Raises UsageError if the directory is that of a run with another id than the one set.
    """
    path = Path(config.run.directory) / RUN
    try:
        known = str(json.loads(path.read_text(encoding="utf-8")).get("run", ""))
    except (OSError, ValueError, AttributeError):
        known = ""
    if known and config.run.id not in ("", known):
        raise UsageError(f"run.id={config.run.id}: {config.run.directory} is the directory of the run {known}; set it back, or "
                         "use another run.directory")  # fmt: skip
    return config.run.id or known or secrets.token_hex(4)


def check_owner(folder: Location, run: str) -> None:
    """Raise UsageError if the folder is another run's."""
    owner = _owner(folder)
    if owner and owner.run != run:
        raise UsageError(
            f"the checkpoints in {folder} are those of the run {owner.run} ({owner.directory} on {owner.host}); give this run "
            f"a checkpoint.directory of its own, or go on with that one from here by run.id={owner.run}"
        )


def claim(folder: Location, run: str, directory: str) -> str:
    """Write down that this command's first group keeps the run's checkpoints there; returns what the group is known by.

    Raises UsageError if the folder is another run's, DataError if it cannot be written.
    """
    check_owner(folder, run)
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = Owner(run, secrets.token_hex(8), directory, socket.gethostname(), now)
    if isinstance(folder, Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(write_failure(folder, error)) from error
    _write(folder, owner)
    return owner.claim


def take_over(experiment: Experiment) -> Experiment:
    """The experiment for the command's next group of workers, which alone may save from now on.  Raises as `require_claim`."""
    owner = require_claim(experiment)
    if owner is None:
        return experiment
    following = replace(owner, group=owner.group + 1)
    _write(directory_of(experiment.config), following)
    return replace(experiment, claim=following.claim)


def require_claim(experiment: Experiment) -> Owner | None:
    """The owner of the checkpoints' folder, which is this group of workers; None where nobody looks (see `Experiment`).

    Raises DataError if another command, or a later group of this one, has claimed the folder since, or the claim is gone.
    """
    if not experiment.claim:
        return None
    folder = directory_of(experiment.config)
    owner = _owner(folder)
    if owner is None:
        raise DataError(f"{folder / OWNER} was removed while this run trained; run the command again")
    if owner.command == experiment.claim.partition("/")[0] and owner.claim != experiment.claim:
        raise DataError(
            f"{folder} was taken over by a later group of this run's workers while these were out of reach; these save nothing "
            "more there"
        )
    if owner.claim != experiment.claim:
        raise DataError(
            f"{folder} was claimed by another command while this one trained (run {owner.run}, {owner.directory} on "
            f"{owner.host}, {owner.since}); this one saves nothing more there; give each run a checkpoint.directory of its own"
        )
    return owner


def _write(folder: Location, owner: Owner) -> None:
    atomic_text(folder / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


def _owner(folder: Location) -> Owner | None:
    try:
        text = read_bytes(folder / OWNER)
    except Absent:
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder / OWNER} cannot be read ({error}); remove it if no other run keeps checkpoints there"
        ) from error
