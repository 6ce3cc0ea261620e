"""Whole files on their way between this machine and a store."""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upath import UPath

from mmearth_ray.errors import DataError
from mmearth_ray.patience import PATIENCE, Absent, Patience, note, patiently
from mmearth_ray.storage import PART, Location, filesystem, read_ranges, request, stamp

BLOCK = 4 * PART
"""Bytes of a remote file that are held in memory while it is copied."""

PIECE = 2 * PART
"""Longer files are uploaded in pieces of this size, each asked for again by itself (S3 takes 10,000: 160 GB)."""

PIECES = 4
"""Pieces that are on their way side by side, and in memory."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A local folder for what is on its way; it goes in the end.  Raises DataError if none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="mmearth-ray-", ignore_cleanup_errors=True)
    except OSError as error:
        named = os.environ.get("TMPDIR")
        place = f"TMPDIR={named}" if named else "the directory for temporary files"
        raise DataError(f"{place} cannot be used ({error.strerror or error}); set TMPDIR to a directory that can be written "
                        "and has room for the files of a store on their way") from error  # fmt: skip
    with folder as name:
        yield Path(name)


@contextmanager
def at_hand(folder: Location, files: Iterable[str]) -> Iterator[Path]:
    """A local folder with those files: `folder` itself, or copies that go when they are no longer used.

    Raises Absent and DataError.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with scratch() as local:
        for name in files:
            _download(folder / name, local / name)
        yield local


def _download(place: UPath, local: Path) -> None:
    size = stamp(place).size
    try:
        with local.open("wb") as file:
            for start in range(0, size, BLOCK):
                (data,), faults = read_ranges(place, [(start, min(start + BLOCK, size))])
                note(faults)
                file.write(data)
    except OSError as error:
        raise DataError(f"cannot copy {place} to {local.parent} ({error.strerror or error}); free some space, or set TMPDIR "
                        "to a directory with more") from error  # fmt: skip


def upload(local: Path, place: UPath, patience: Patience = PATIENCE) -> None:
    """Put a local file: a store shows it whole or not at all.  Raises DataError.

    What a kill leaves of a long upload shows nowhere, but S3 keeps it until a lifecycle rule of the bucket removes it.
    """
    size = local.stat().st_size
    if size <= PIECE or not hasattr(filesystem(place), "call_s3"):
        patiently(place, lambda: request(place, patience, "put_file", str(local), place.path, size=size), patience)
        return
    try:
        _upload_pieces(local, size, place, patience)
    except Absent:  # a store forgets an upload that it has ended: the answer was lost, and it was asked to end it again
        _upload_pieces(local, size, place, patience)


def _upload_pieces(local: Path, size: int, place: UPath, patience: Patience) -> None:
    """S3's upload in parts.  Raises Absent if the store no longer knows the upload, and DataError."""
    bucket, key, _ = filesystem(place).split_path(place.path)

    def call(method: str, size: int = 0, patience: Patience = patience, **given: Any) -> Any:
        ask = lambda: request(place, patience, "call_s3", method, Bucket=bucket, Key=key, size=size, **given)  # noqa: E731
        return patiently(place, ask, patience)

    number = call("create_multipart_upload")["UploadId"]

    def put(piece: int) -> dict[str, Any]:
        with local.open("rb") as file:
            file.seek(piece * PIECE)
            data = file.read(PIECE)
        answer = call("upload_part", len(data), UploadId=number, PartNumber=piece + 1, Body=data)
        return {"PartNumber": piece + 1, "ETag": answer["ETag"]}

    try:
        with ThreadPoolExecutor(PIECES, "upload") as pool:
            parts = list(pool.map(put, range(math.ceil(size / PIECE))))
        call("complete_multipart_upload", size, UploadId=number, MultipartUpload={"Parts": parts})
    except (DataError, OSError):
        with suppress(DataError):
            call("abort_multipart_upload", patience=Patience(attempts=1, request=patience.request), UploadId=number)
        raise
