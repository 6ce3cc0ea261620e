"""The patience with a store: which of its errors pass, how often and how long it is asked again, what is said in the end."""

import errno
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mmearth_ray.errors import DataError

T = TypeVar("T")

LASTING = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG,
    getattr(errno, "EREMCHG", errno.EINVAL),
)  # fmt: skip
"""Errors that stay however often one asks; the last is how s3fs says that a bucket is in another region."""

PASSING_BOTO = {"HTTPClientError", "ConnectionError", "IncompleteReadError"}
"""botocore's errors on the way to a store; all its others are about settings and credentials."""


class Absent(DataError):
    """Nothing is stored at that place."""


SLOWEST = 1e6
"""Bytes a second below which a store is taken for one that does not answer."""


@dataclass(frozen=True)
class Patience:
    """How often a store is asked, and the waits between: seconds, doubled from the first to the longest, with jitter.

    No request begins later than `seconds` after the first, and each has `request` seconds and a second more per MB, so that
    a store that stays away is given up after `seconds` + `request`.
    """

    attempts: int = 8
    first_wait: float = 0.2
    longest_wait: float = 20.0
    seconds: float = 60.0
    request: float = 30.0

    def wait(self, attempt: int) -> float:
        return min(self.longest_wait, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)

    def pause(self, attempt: int, begin: float) -> bool:
        """Wait before the next attempt at what began at `begin` (monotonic); False, at once, if there is to be none."""
        wait = self.wait(attempt)
        if attempt + 1 >= self.attempts or time.monotonic() + wait - begin > self.seconds:
            return False
        time.sleep(wait)
        return True

    def limit(self, size: int) -> float:
        """Seconds after which a request for that many bytes is given up."""
        return self.request + size / SLOWEST


PATIENCE = Patience()


def patiently(place: object, call: Callable[[], T], patience: Patience = PATIENCE) -> T:
    """What `call` returns, asked again while faults are passing ones, which are noted.

    Raises Absent and DataError, in one line that names the place.
    """
    found, faults = counted(place, call, patience)
    note(faults)
    return found


def counted(place: object, call: Callable[[], T], patience: Patience = PATIENCE) -> tuple[T, int]:
    """The same, and how often it failed before, which the caller accounts for."""
    begin, attempt = time.monotonic(), 0
    while True:
        try:
            return call(), attempt
        except Exception as error:
            if not is_passing(error) or not patience.pause(attempt, begin):
                raise explained(place, error, attempt + 1) from error
        attempt += 1


_lock = threading.Lock()
_noted = 0


def note(faults: int) -> None:
    """Add to this process's faults that no batch carries: of listings, metadata, whole files."""
    global _noted
    with _lock:
        _noted += faults


def take_noted() -> int:
    """How many were noted since this was asked last."""
    global _noted
    with _lock:
        taken, _noted = _noted, 0
    return taken


def is_passing(error: Exception) -> bool:
    """Whether asking again may help: not what is absent, forbidden or malformed, nor a mistake in a program."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in LASTING
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "BotoCoreError" in kinds:
        return not kinds.isdisjoint(PASSING_BOTO)
    return not isinstance(error, AssertionError | AttributeError | ImportError | LookupError | TypeError | ValueError)


def explained(place: object, error: Exception, attempts: int) -> DataError:
    """The error as one line on the place, what went wrong and what to do."""
    if isinstance(error, DataError):
        return error
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    if " " not in reason and not (reason and isinstance(error, OSError)):  # a key, or nothing
        reason = f"{type(error).__name__} {reason}".strip()
    if isinstance(error, FileNotFoundError):
        response = getattr(error.__cause__, "response", {})  # of botocore's error behind s3fs's
        if response.get("Error", {}).get("Code") == "NoSuchBucket":
            return Absent(f"the bucket of {place} does not exist; check its name, and AWS_ENDPOINT_URL if it is not on AWS")
        return Absent(f"{place} does not exist")
    if isinstance(error, PermissionError):
        return DataError(f"{place}: access denied ({reason}); check the credentials and what they allow")
    if "Credential" in type(error).__name__:
        return DataError(f"{place}: there are no usable credentials ({reason}); set AWS_ACCESS_KEY_ID and "
                         "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket")  # fmt: skip
    if not is_passing(error):
        return DataError(f"{place} cannot be used ({reason}); check the URL and the settings of its store")
    often = f" in {attempts} attempts" if attempts > 1 else ""
    return DataError(f"{place} cannot be reached{often} ({reason}); run the command again once its store answers")
