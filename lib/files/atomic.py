"""Atomic writing of files, and their digests."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

READ_BYTES = 1 << 20


def write_whole(data: bytes | memoryview, path: Path) -> None:
    """Write `data` so that `path` holds either the old bytes or the new ones, never a part of them.

    The bytes go to a temporary file beside the target, are flushed to the disk, and the file is renamed.
    Missing folders are made.

    Raises:
        OSError: if the file cannot be written; `strerror` names the path, the bytes needed and the bytes
            free, the old file stays and nothing else is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a file on a full disk is of no use
            temporary.unlink()
        raise OSError(error.errno, _failure(path, len(data), error)) from error


def _failure(path: Path, num_bytes: int, error: OSError) -> str:
    try:
        free: int | str = shutil.disk_usage(path.parent).free
    except OSError:
        free = "an unknown number"
    return (
        f"cannot write {path} ({num_bytes} bytes, {free} free): {error.strerror or error}; the file that "
        "was there before is intact"
    )


def _flush_folder(folder: Path) -> None:
    """Flush `folder`, so that a renamed file in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            running.update(piece)
    return running.hexdigest()
