"""Faults for a script that a test starts with `forked.Running`, planted in its process before it begins."""

import builtins
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.files import atomic


class _Watched:
    """The file operations of `lib.files.atomic`, with a call of `before` ahead of each one.

    A write calls it when half of the bytes are in the file.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before

    def __getattr__(self, name: str) -> Any:
        """Everything of the module `os`, with a call ahead of what flushes a file or names it."""
        real = getattr(os, name)
        if name not in ("fsync", "replace"):
            return real

        def watched(*given: Any) -> Any:
            self._before()
            return real(*given)

        return watched

    def open(self, path: Path, mode: str | int) -> Any:
        """Both `os.open` of a folder and the built-in function of a file."""
        self._before()
        if isinstance(mode, int):
            return os.open(path, mode)
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115 - its caller closes it
        write = file.write

        def in_halves(data: memoryview) -> None:
            write(data[: len(data) // 2])
            self._before()
            write(data[len(data) // 2 :])

        file.write = in_halves
        return file


def _watch(before: Callable[[], None]) -> None:
    atomic.os = watched = _Watched(before)
    atomic.open = watched.open


def block_logs(folder: Path, *names: str) -> None:
    """Let `log.jsonl`, or the `events` of the next two minutes, be files on a disk without room."""
    folder.mkdir(parents=True, exist_ok=True)
    now, host = int(time.time()), socket.gethostname()
    for name in names:
        suffixes = (
            [f".out.tfevents.{now + s}.{host}" for s in range(120)] if name == "events" else [""]
        )
        for suffix in suffixes:
            (folder / f"{name}{suffix}").symlink_to("/dev/full")


def keep_states(folder: Path, kept: Path) -> None:
    """Copy the folder ahead of every file operation: what a process killed there would leave.

    The copies are kept/1, kept/2 ..., without the logs, each one only where it differs from the one before,
    whatever a temporary file holds.
    """
    seen: list[dict[str, int]] = []

    def copy() -> None:
        files = [p for p in folder.rglob("*") if p.is_file() and "log" not in p.parts]
        state = {str(p): p.suffix == ".tmp" or p.stat().st_mtime_ns for p in files}
        if state not in seen[-1:]:
            seen.append(state)
            ignored = shutil.ignore_patterns("log")
            shutil.copytree(folder, kept / str(len(seen)), ignore=ignored)

    _watch(copy)


def kill_at(operation: int) -> None:
    """Let this process kill itself at so many file operations, from 1."""
    left = [None] * operation

    def count() -> None:
        left.pop()
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(count)
