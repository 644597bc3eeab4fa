"""Download the files that were published in 2019: each one arrives checked, or not at all.

    bash scripts/download_model.sh                          all of them, into checkpoint/
    bash scripts/download_model.sh --list                   what there is, what for, what lies here already
    bash scripts/download_model.sh --only 'pseudos/*' --only '*resnet50*'
    bash scripts/download_model.sh --base-url https://mirror.example/metric-transfer/

An archive `pseudos/NAME.tar` becomes the folder `pseudos/NAME/` and is not kept. A file gets its name only
after it was opened as what it should be; files that are there already are opened too, and never overwritten.
The exit code is 1 if anything is missing or wrong. The host may be gone for good: --list names the command
that makes a file of the same kind, and --base-url also takes a folder of this machine, file:///DIR.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from lib.cli import declared, start
from lib.features import extraction
from lib.files import published
from lib.files.published_pickle import printable
from lib.files.weights import model_weights
from lib.labels import pseudo_files

MANIFEST = Path(__file__).with_name("manifest.json")
TIMEOUT_S = 30.0  # without an answer or without data
CHECKS: dict[str, Callable[[Path], Any]] = {  # by the top folder of the published tree
    "pretrain_models": lambda path: model_weights(published.load(path), path),
    "train_features_labels_cache": extraction.read,
    "pseudos": pseudo_files.load,
    "pseudos_imagenet": pseudo_files.load,
}


@dataclass(frozen=True)
class Published:
    """One published file, at `path` below the base address and below the folder that files go to."""

    path: str
    purpose: str
    make: str  # command of our own phases that makes a file of the same kind
    sha256: str | None = None  # where it is known
    members: tuple[str, ...] = ()  # names in the archive; empty for a file that is not an archive

    @property
    def result(self) -> str:
        """Path of the file, or of the folder that an archive becomes."""
        return self.path.removesuffix(".tar") if self.members else self.path

    def check(self, place: Path) -> None:
        """Raise ValueError if the file or folder `place` is not what it should be."""
        for name in self.members or ("",):
            CHECKS[self.path.split("/")[0]](place / name)


def read_manifest() -> tuple[list[str], list[Published]]:
    """Return the base addresses, and the files that are published below each of them."""
    written = json.loads(MANIFEST.read_text())
    members = {kind: tuple(names) for kind, names in written["members"].items()}
    files = [f | {"members": members.get(f.get("members"), ())} for f in written["files"]]
    return written["base_urls"], [Published(**file) for file in files]


def select(files: Sequence[Published], patterns: Sequence[str]) -> list[Published]:
    """Return the files whose path or name matches any of the shell patterns; all without patterns."""
    chosen = [] if patterns else list(files)
    for pattern in patterns:
        found = [f for f in files if fnmatch(f.path, pattern) or fnmatch(f.path, f"*/{pattern}")]
        if not found:
            raise ValueError(f"--only {pattern}: no published file matches it; --list shows them")
        chosen += [file for file in found if file not in chosen]
    return chosen


def obtain(file: Published, folder: Path, base_urls: Sequence[str]) -> str:
    """Put one published file in its place below `folder`, unless it is there; return what was done.

    Raises:
        ValueError: if no address has it, or it is not what it should be; nothing of it is kept.
        ConnectionError: if no host can be reached, so that other files cannot be fetched either.
    """
    target = folder / file.result
    if target.exists():
        file.check(target)
        return "there already"
    scratch = target.with_name(target.name + ".downloading")
    shutil.rmtree(scratch, ignore_errors=True)  # a run that was killed may have left it
    scratch.mkdir(parents=True)
    try:
        arrived = receive(file, scratch, base_urls)
        if file.members:
            arrived = unpack(arrived, scratch / "unpacked", file.members)
        file.check(arrived)
        os.replace(arrived, target)
    finally:
        shutil.rmtree(scratch)
    return "fetched"


def receive(file: Published, folder: Path, base_urls: Sequence[str]) -> Path:
    """Download a file into `folder` from the first address that has it."""
    arrived, errors = folder / Path(file.path).name, {}
    for base_url in base_urls:
        url = f"{base_url.rstrip('/')}/{file.path}"
        try:
            torch.hub.download_url_to_file(
                url, str(arrived), file.sha256, progress=sys.stderr.isatty()
            )
            return arrived
        except (OSError, HTTPException, RuntimeError) as error:
            errors[url] = error
    reasons = ", ".join(f"{url} ({error})" for url, error in errors.items())
    # An HTTPError is a URLError as well, but it is an answer; and a folder has no host.
    gone = all(u.startswith("http") and type(e) is URLError for u, e in errors.items())
    raise (ConnectionError if gone else ValueError)(f"cannot be fetched from {reasons}")


def unpack(archive: Path, folder: Path, members: Collection[str]) -> Path:
    """Unpack an uncompressed tar archive of plain files into the new `folder`, which is returned.

    Raises:
        ValueError: if it does not hold exactly `members`, directly or in one folder of its own name.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError(
            "this Python cannot unpack archives safely (tarfile has no data filter): use Python 3.10.12, "
            "3.11.4 or newer"
        )
    missing, stem = set(members), archive.name.removesuffix(".tar")
    try:
        with tarfile.open(archive, "r:") as tar:
            for entry in tar:
                name = entry.name.removeprefix("./").removeprefix(f"{stem}/")
                if entry.isdir() and name in ("", ".", stem):
                    continue
                if name not in missing or not entry.isreg() or entry.issparse():
                    raise ValueError(f"{printable(entry.name)} does not belong in it")
                missing.remove(name)
                tar.extract(entry.replace(name=name), folder, filter="data")
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{archive.name}: {error}; nothing was unpacked") from error
    return folder


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="files whose path or name matches this shell pattern; may be given several times",
    )
    parser.add_argument("--dest", default="./checkpoint", metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--base-url",
        action="append",
        metavar="URL",
        help="another address of the published folder tree; may be given several times, each is tried until "
        "one has the file",
    )
    parser.add_argument("--list", action="store_true", help="show the files and fetch nothing")
    return parser


def main(args: argparse.Namespace) -> None:
    base_urls, files = read_manifest()
    files, folder, failed = select(files, args.only or ()), Path(args.dest), False
    for url in args.base_url or ():
        if not url.startswith(("https://", "http://", "file:///")):
            raise ValueError(f"--base-url {url}: write https://, http:// or file:/// before it")
    socket.setdefaulttimeout(TIMEOUT_S)  # torch.hub would wait forever
    for file in files:
        if args.list:
            print(f"{'here' if (folder / file.result).exists() else '-':4}  {file.path}")
            print(f"      {file.purpose}\n      one of its kind: {file.make}")
            continue
        try:
            print(f"{obtain(file, folder, args.base_url or base_urls):13}  {file.path}", flush=True)
        except (ValueError, OSError) as error:
            failed = True
            print(f"failed         {file.path}: {error}", file=sys.stderr)
            if isinstance(error, ConnectionError):
                break
    if failed:
        print(
            "Files are missing or wrong: run this again later, name a mirror with --base-url URL, or make "
            "files of the same kind with the commands that --list shows.",
            file=sys.stderr,
        )
        sys.exit(start.EXIT_FAILURE)


if __name__ == "__main__":
    start.run(main, build_parser())
