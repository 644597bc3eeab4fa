"""Fetch the published files: every one verified, or absent.

    bash scripts/download_model.sh                          all of them, into checkpoint/
    bash scripts/download_model.sh --list                   what there is, what for, what lies here already
    bash scripts/download_model.sh --only 'pseudos/*' --only '*resnet50*'
    bash scripts/download_model.sh --base-url https://mirror.example/metric-transfer/
    bash scripts/download_model.sh --verify                 read everything again, fetch nothing

A download that broke off goes on where it stopped. Archives (`pseudos/NAME.tar`) become the folder
`pseudos/NAME/` and are not kept themselves; one that already lies there is unpacked without a download.
No digests were published, so each is written to DIR/downloads.json when a file is first seen and compared
from then on. What stands there already is never overwritten. Exit code 1 if anything is missing or
wrong: each such file has a line that says why, with the command of our own phases that makes its kind.
"""

import argparse
import fcntl
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.cli import options
from lib.files import archives, checkpoint, transfer
from lib.files.atomic import put_in_place, sha256_of, write_whole
from lib.files.transfer import PassingError, RefusedError, Rules, StoppedError
from lib.runtime import interruption

MANIFEST = Path(__file__).with_name("manifest.json")
RECORDS, LOCK = "downloads.json", "downloads.lock"
HEAD_BYTES = 512
BAR: Mapping[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
PICKLE, ZIP = b"\x80", b"PK\x03\x04"  # how the two formats of torch.save begin


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        path: below the base address, and below the folder that files go to.
        purpose: what it is for.
        make: the command of our own phases that makes the same kind of file.
        num_bytes, sha256: where they are known.
        members: names in the archive; empty for a file that is none.
        mirrors: further addresses of this file.
    """

    path: str
    purpose: str
    make: str
    num_bytes: int | None = None
    sha256: str | None = None
    members: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Where an archive goes: its path without `.tar`."""
        return self.path.removesuffix(".tar")

    @property
    def results(self) -> tuple[str, ...]:
        """The files that shall be there in the end: itself, or what is in it."""
        return tuple(f"{self.folder}/{name}" for name in self.members) or (self.path,)


def read_manifest(path: Path = MANIFEST) -> tuple[list[str], list[Published]]:
    """The base addresses and the files that are published below each of them."""
    written = json.loads(path.read_text())
    files = [
        Published(
            entry["path"],
            entry["purpose"],
            entry["make"],
            entry["bytes"],
            entry["sha256"],
            tuple(written["members"][entry["members"]] if "members" in entry else ()),
            tuple(entry.get("mirrors", ())),
        )
        for entry in written["files"]
    ]
    return written["base_urls"], files


def select(files: Sequence[Published], patterns: Sequence[str] = ()) -> list[Published]:
    """The files whose path, or its last part, is like any of the shell patterns; all without patterns.

    Raises:
        ValueError: for a pattern that is like none.
    """
    for pattern in patterns:
        if not any(_is_like(file, pattern) for file in files):
            raise ValueError(f"--only {pattern}: no published file is like it; --list shows them")
    return [f for f in files if not patterns or any(_is_like(f, p) for p in patterns)]


def _is_like(file: Published, pattern: str) -> bool:
    return fnmatch(file.path, pattern) or fnmatch(Path(file.path).name, pattern)


class Records:
    """`downloads.json`: for each published path the digest first seen, and of each file in its place."""

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / RECORDS, threading.Lock()
        try:
            self.entries = json.loads(self.path.read_text()) if self.path.exists() else {}
            if not all(isinstance(facts, dict) for facts in self.entries.values()):
                raise ValueError("an entry is no object")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); move it away") from error

    def get(self, path: str) -> dict[str, Any]:
        return self.entries.get(path, {})

    def update(self, path: str, **facts: Any) -> None:
        with self._lock:
            self.entries[path] = self.get(path) | facts
            write_whole(json.dumps(self.entries, indent=1, sort_keys=True).encode(), self.path)


def _facts(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "sha256": sha256_of(path).hexdigest(),
        "mtime_ns": stat.st_mtime_ns,
    }


def check_content(path: Path, name: str) -> None:
    """Refuse what begins unlike the kind of file that `name` promises.

    Raises:
        RefusedError: saying what it looks like.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    is_archive = name.endswith(".tar") and not name.endswith(".pth.tar")
    good = head[257:262] == b"ustar" if is_archive else head.startswith((PICKLE, ZIP))
    if good:
        return
    page = head.lstrip().startswith((b"<", b"{", b"\xef\xbb\xbf<"))
    kind = "an error or login page" if page else f"it begins with {head[:8]!r}" if head else "empty"
    wanted = "tar archive" if is_archive else "file of torch.save"
    raise RefusedError(f"no {wanted}: {kind}")


def check_digest(file: Published, records: Records, num_bytes: int, sha256: str) -> None:
    """Compare with what was published, or with what was seen the first time.

    Raises:
        RefusedError: if it is another file.
    """
    seen = records.get(file.path).get("sha256")
    if file.num_bytes not in (None, num_bytes):
        raise RefusedError(f"it has {num_bytes} bytes, the published file {file.num_bytes}")
    if file.sha256 not in (None, sha256):
        raise RefusedError(f"its sha256 is {sha256}, the published one {file.sha256}")
    if seen not in (None, sha256):
        raise RefusedError(
            f"its sha256 is {sha256}, but {seen} when first seen: another file by now. To accept it, remove "
            f"its entry from {records.path}"
        )


def is_there(file: Published, folder: Path, records: Records, *, thorough: bool = False) -> bool:
    """Whether all results of a published file are in place, as they were recorded.

    Recorded length and time of change stand for the content unless `thorough`. Files that are there but
    not recorded are looked at, and recorded as first seen.

    Raises:
        ValueError: if some are missing beside others, one is not what was recorded or no such file, or a
            folder holds pseudo-labels of our own under the name of published ones.
    """
    present = [name for name in file.results if (folder / name).exists()]
    if not present and not (file.members and (folder / file.folder).exists()):
        return False
    missing = [name for name in file.results if name not in present]
    if missing:
        raise ValueError(
            f"{folder / file.folder} stands in the way: it lacks {', '.join(missing)}; move it away"
        )
    recorded = records.get(file.path).get("files", {})
    facts = {}
    for name in present:
        facts[name] = _still(folder / name, recorded.get(name), thorough)
        if file.members and name not in recorded:
            _refuse_own(folder / name)
        if not file.members:
            check_digest(file, records, facts[name]["bytes"], facts[name]["sha256"])
    if facts != recorded:
        _record(file, records, facts)
    return True


def _refuse_own(path: Path) -> None:
    """Refuse pseudo-labels that phase 2 wrote here: recorded, they would pass for the published ones."""
    if "meta" in checkpoint.load_dict(path):
        raise ValueError(f"{path.parent} was not unpacked by this script: move it away")


def _still(path: Path, known: Mapping[str, Any] | None, thorough: bool) -> dict[str, Any]:
    """The facts of a file, read only where needed, equal to the known ones or first seen."""
    stat = path.stat()
    unchanged = known and (known.get("bytes"), known.get("mtime_ns")) == (
        stat.st_size,
        stat.st_mtime_ns,
    )
    if known and unchanged and not thorough:
        return dict(known)
    try:
        check_content(path, path.name)
    except RefusedError as error:
        raise ValueError(f"{path} is {error}; remove it to fetch it again") from error
    facts = _facts(path)
    if known and facts["sha256"] != known.get("sha256"):
        raise ValueError(
            f"{path} has changed: its sha256 is {facts['sha256']}, recorded is {known.get('sha256')}; remove "
            "it to fetch it again, or keep your own files in another folder (--dest)"
        )
    return facts


def _record(file: Published, records: Records, facts: Mapping[str, Any], **origin: Any) -> None:
    """Note the results; of a file that is no archive, they are what was published."""
    own = {} if file.members else {k: facts[file.path][k] for k in ("bytes", "sha256")}
    seen = records.get(file.path).get("first_seen", time.strftime("%Y-%m-%d"))
    records.update(file.path, files=dict(facts), first_seen=seen, **own | origin)


def obtain(
    file: Published,
    folder: Path,
    records: Records,
    base_urls: Sequence[str],
    rules: Rules,
    progress: transfer.Progress = lambda size, total: None,
) -> str:
    """Put one published file in its place, unless it is there.

    Returns:
        What was done, in a word or two.

    Raises:
        ValueError: if no address gave it, with the reason of each; nothing wrong is kept.
        OSError: if it cannot be written.
        StoppedError: if `rules.stopping()`.
    """
    part, by_hand = folder / f"{file.path}.part", folder / file.path
    if is_there(file, folder, records):
        transfer.discard(part)  # what a run left that was killed after the renaming
        return "there already"
    part.parent.mkdir(parents=True, exist_ok=True)
    if file.members and by_hand.is_file():
        _place(file, by_hand, sha256_of(by_hand).hexdigest(), folder, records)
        return "unpacked"
    reasons = []
    for url in [*(f"{base.rstrip('/')}/{file.path}" for base in base_urls), *file.mirrors]:
        try:
            digest = transfer.fetch(
                *(url, part, rules), expected_bytes=file.num_bytes, progress=progress
            )
            _place(file, part, digest, folder, records, url=url)
        except (ValueError, PassingError) as error:
            reasons.append(str(error))
        else:
            return "fetched"
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _place(
    file: Published, source: Path, digest: str, folder: Path, records: Records, **origin: str
) -> None:
    """Check a whole file, rename or unpack it, note what is in place; a part that fails is removed."""
    part, size = folder / f"{file.path}.part", source.stat().st_size
    try:
        check_content(source, file.path)
        check_digest(file, records, size, digest)
        if file.members:
            archives.unpack(source, folder / file.folder, file.members)
        else:
            put_in_place(source, folder / file.path)
    except ValueError:
        transfer.discard(part)
        raise
    transfer.discard(part)
    facts = {name: _facts(folder / name) for name in file.results}
    _record(file, records, facts, bytes=size, sha256=digest, **origin)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other downloads out of `folder`; the system lifts the lock if this process is killed.

    Raises:
        ValueError: if another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another download into {folder} is running; wait for it") from error
        yield


Outcome = tuple[Published, str, str]  # the file, what was done, or else why not


def each(
    files: Iterable[Published], work: Callable[[Published], str], jobs: int
) -> Iterator[Outcome]:
    """`work` of every file, `jobs` at a time, as they are done; a failure does not end the others."""

    def guarded(file: Published) -> Outcome:
        try:
            return file, work(file), ""
        except StoppedError:
            return file, "stopped", ""
        except (ValueError, OSError) as error:
            return file, "", str(error)

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(guarded, file) for file in files]):
            yield done.result()


@contextmanager
def bar_of(file: Published, in_total: tqdm) -> Iterator[transfer.Progress]:
    """A progress bar for one file while it is received, which moves the one of all bytes along."""
    with tqdm(desc=Path(file.path).name, **BAR) as bar:

        def progress(size: int, total: int | None) -> None:
            in_total.total += (total or 0) - (bar.total or 0)
            bar.total = total
            in_total.update(size - bar.n)
            bar.update(size - bar.n)

        yield progress


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="files whose path or name is like this shell pattern; may be given several times",
    )
    parser.add_argument("--dest", default="./checkpoint", metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--base-url",
        action="append",
        metavar="URL",
        help="address of the published folder tree in place of the published one; may be given several "
        "times, each is tried until one has the file",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the files and fetch nothing")
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be fetched from where, without asking",
    )
    what.add_argument(
        "--verify",
        action="store_true",
        help="read every file again and compare its digest; fetch nothing",
    )
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at the same time")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds of silence that end an attempt"
    )
    parser.add_argument(
        "--retries", type=int, default=4, help="further attempts after a failure that may heal"
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.require_positive(args, "jobs", "timeout")
    options.require_not_negative(args, "retries")
    for url in args.base_url or ():
        if not url.startswith(("https://", "http://")):
            raise ValueError(f"--base-url {url}: an address begins with https:// or http://")


def show(files: Sequence[Published], folder: Path, records: Records) -> None:
    """--list: a line for each file and one for what it is for."""
    for file in files:
        known = records.get(file.path)
        size = file.num_bytes or known.get("bytes")
        there = all((folder / name).exists() for name in file.results)
        print(f"{'here' if there else '-':4}  {file.path}  ({size or 'length unknown'})")
        print(f"      {file.purpose}")


def plan(
    files: Sequence[Published], folder: Path, records: Records, base_urls: Sequence[str]
) -> None:
    """--dry-run: from where to where, without asking any server."""
    for file in files:
        if all((folder / name).exists() for name in file.results):
            print(f"there already  {file.path}")
            continue
        target = folder / (f"{file.folder}/" if file.members else file.path)
        print(f"would fetch    {base_urls[0].rstrip('/')}/{file.path} -> {target}")


def verify(file: Published, folder: Path, records: Records) -> str:
    """--verify: the digests of what is in place."""
    if not is_there(file, folder, records, thorough=True):
        raise ValueError("not there")
    return "right"


def report(outcomes: Iterable[Outcome]) -> int:
    """A line for each outcome, with the command that makes what could not be had; the number of failures."""
    counts: dict[str, int] = {}
    for file, done, reason in outcomes:
        counts[done or "missing or wrong"] = counts.get(done or "missing or wrong", 0) + 1
        if done:
            tqdm.write(f"{done:13}  {file.path}")
        else:
            instead = f"; to make one of its kind: {file.make}"
            tqdm.write(f"failed         {file.path}: {reason}{instead}", file=sys.stderr)
    print(", ".join(f"{number} {word}" for word, number in counts.items()))
    return counts.get("missing or wrong", 0)


def main(args: argparse.Namespace) -> None:
    # 1. Which files, from where
    check_options(args)
    published, files = read_manifest()
    files, base_urls = select(files, args.only or ()), args.base_url or published
    folder = Path(args.dest)
    if args.list or args.dry_run:
        records = Records(folder)
        return (
            show(files, folder, records) if args.list else plan(files, folder, records, base_urls)
        )

    # 2. Read again, or fetch; alone in the folder
    with (
        alone_in(folder),
        interruption.watch() as stop,
        tqdm(total=0, desc="in total", **BAR) as in_total,
    ):
        records = Records(folder)
        rules = Rules(timeout=args.timeout, retries=args.retries, stopping=stop.requested)

        def work(file: Published) -> str:
            if args.verify:
                return verify(file, folder, records)
            with bar_of(file, in_total) as progress:
                return obtain(file, folder, records, base_urls, rules, progress)

        failures = report(each(files, work, args.jobs))
    stop.exit()
    if failures:
        sys.exit(options.EXIT_FAILURE)


if __name__ == "__main__":
    options.run(main, build_parser())
