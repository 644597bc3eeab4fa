"""Archives from elsewhere, unpacked so that nothing can land outside of their own folder.

Of an archive only three things are used: the name of an entry, as a key into the list of expected names
(no path is ever built from it), its length, and its bytes. Owners, modes, times, links and devices are
never applied, so there is nothing in them to trust.
"""

import os
import re
import shutil
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from lib.files.atomic import flush_folder

BLOCK = tarfile.BLOCKSIZE
MAX_ENTRIES = 1000  # headers of any kind; the published archives hold 11 entries at most
MAX_PAX_BYTES = 65536  # an extended header holds times and names: a few hundred bytes
COPY_BYTES = 1 << 20

# Extended headers that change what an entry is. We ignore them all, so these may not be there.
DECISIVE = re.compile(rb"(?:^|\n)\d+ (path|linkpath|size|hdrcharset|GNU\.sparse[^=]*)=")


def unpack(archive: Path, folder: Path, members: Collection[str], *, stem: str = "") -> None:
    """Unpack an uncompressed tar into the new folder `folder`: all of `members`, or nothing.

    The entries are plain files that bear the names `members`, directly or in one folder named like the
    archive. They are written to a fresh folder beside the target, which is renamed when all is there.

    Args:
        archive: the file.
        folder: to be made; its parent exists.
        members: every name that the archive must hold; no other may be in it.
        stem: name of the one folder in the archive (default: the name of `folder`).

    Raises:
        ValueError: naming the entry that is no plain file, unexpected, twice there, missing or cut off,
            or an archive that is compressed or damaged. Nothing is left behind.
        OSError: if the disk is full or cannot be written to; nothing is left behind either.
    """
    fresh = folder.with_name(folder.name + ".unpacking")
    if folder.exists():
        raise ValueError(f"{folder} is there already; move it away to unpack {archive.name}")
    if fresh.exists():  # what a killed run left
        shutil.rmtree(fresh)
    fresh.mkdir()
    try:
        with open(archive, "rb") as file:
            _unpack_members(file, fresh, members, stem or folder.name)
        flush_folder(fresh)
        fresh.rename(folder)
        flush_folder(folder.parent)
    except ValueError as error:
        raise ValueError(f"{archive.name}: {error}; nothing was unpacked") from error
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _unpack_members(file: BinaryIO, fresh: Path, members: Collection[str], stem: str) -> None:
    prefixes = ("", "./", f"{stem}/", f"./{stem}/")
    expected = {prefix + name: name for prefix in prefixes for name in members}
    missing = set(members)
    for entry in _entries(file):
        if entry.isdir() and entry.name in (".", stem, f"./{stem}"):
            continue
        name = expected.get(entry.name)
        if name is None:
            raise ValueError(f"{entry.name!r} is no file that it should hold")
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"{entry.name!r} is no plain file (type {entry.type!r})")
        if name not in missing:
            raise ValueError(f"{name!r} is in it twice")
        missing.remove(name)
        _copy(file, fresh / name, entry.size)
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing")


def _entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers in order, each with `file` standing at its data when it is handed out.

    tarfile's own reader also follows what extended headers say (other names, sparse files of any size),
    so only its parser of a single header is used.
    """
    size, place = os.fstat(file.fileno()).st_size, 0
    for _ in range(MAX_ENTRIES):
        file.seek(place)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ValueError("it ends in the middle")
        if not block.strip(b"\0"):
            return
        entry = _header(block)
        if not 0 <= entry.size <= size - place - BLOCK:
            raise ValueError(f"{entry.name!r} claims {entry.size} bytes, more than the archive has")
        if entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_extended(entry, file)
        else:
            yield entry
        place += BLOCK + -(-entry.size // BLOCK) * BLOCK
    raise ValueError(f"it holds more than {MAX_ENTRIES} entries")


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"it is no uncompressed tar archive, or damaged ({error})") from error
    if b"\0" in block[:100].rstrip(
        b"\0"
    ):  # the name field: readers disagree where such a name ends
        raise ValueError(f"{entry.name!r} has a NUL in its name")
    return entry


def _check_extended(entry: tarfile.TarInfo, file: BinaryIO) -> None:
    if entry.size > MAX_PAX_BYTES:
        raise ValueError(f"an extended header of {entry.size} bytes")
    found = DECISIVE.search(file.read(entry.size))
    if found:
        raise ValueError(f"an extended header sets {found[1].decode('ascii', 'replace')}")


def _copy(file: BinaryIO, target: Path, size: int) -> None:
    with open(target, "xb") as out:
        while size:
            piece = file.read(min(size, COPY_BYTES))
            if not piece:
                raise ValueError(f"{target.name!r} is cut off")
            out.write(piece)
            size -= len(piece)
        out.flush()
        os.fsync(out.fileno())
