"""Atomic writing of files, and their digests."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

READ_BYTES = 1 << 20


def write_whole(data: bytes | memoryview, path: Path, *, flush: bool = True) -> None:
    """Write `data` so that `path` holds either the old bytes or the new ones, never a part of them.

    The bytes go to a temporary file beside the target, are flushed to the disk, and the file is renamed.
    Missing folders are made. Without `flush`, for what is soon made again, the new file may be damaged
    after a power failure, and nobody waits for the disk.

    Raises:
        ValueError: if the file cannot be written, naming the path, the bytes needed and the bytes free. The
            old file stays and nothing else is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if not flush:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a power failure, too
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a file on a full disk is of no use
            temporary.unlink()
        free: int | str = "an unknown number"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"cannot write {path} ({len(data)} bytes, {free} free): {error.strerror or error}; the file "
            "that was there before is intact"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            running.update(piece)
    return running.hexdigest()
