"""The terminal of a script, which may go away before it ends: by SIGHUP, or an output that nobody reads."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CLOSED = (errno.EPIPE, errno.EIO)  # the reader of a pipe ended; the terminal hung up
OTHER = {"stdout": "stderr", "stderr": "stdout"}

_receivers: list[Callable[[int], None]] = []


class ClosedOutputError(OSError):
    """An output was closed while there was nothing to save."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a script to end; SIGHUP is none of them where nohup lets it be ignored."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return asked if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else asked[:2]


@contextmanager
def closing_told_to(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with SIGPIPE when an output is closed within a block, in place of an error."""
    _receivers.append(receive)
    try:
        yield
    finally:
        _receivers.remove(receive)


class _Output(io.FileIO):
    """The file of an output. After a write that fails, what is written is lost, and the other output says so.

    It has the file descriptor `number` and is that of `stream`, which is stdout or stderr.
    """

    def __init__(self, number: int, stream: str) -> None:
        super().__init__(number, "wb", closefd=False)
        self._stream = stream

    def write(self, data: bytes | memoryview) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self._lose(error)
        return memoryview(data).nbytes

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        closed = error.errno in CLOSED
        ending = "the run ends" if closed else "the run goes on without it"
        said = f"{self._stream} is lost ({error.strerror}); {ending}"
        print(said, file=getattr(sys, OTHER[self._stream]), flush=True)
        if closed and _receivers:
            _receivers[-1](signal.SIGPIPE)
        elif closed:
            raise ClosedOutputError(error.errno, error.strerror) from error


def guard_outputs() -> None:
    """Keep a closed or full output from ending this process in the middle of its work.

    A full disk under an output costs what is printed from then on. A closed output is told to
    `closing_told_to`, and outside of it is a ClosedOutputError. Outputs that Python does not write to by
    itself, as in a notebook, stay as they are.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the script, which is a wish
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            file = _Output(number, name)
            unbuffered = stream.write_through  # as with python -u
            guarded = io.TextIOWrapper(
                file if unbuffered else io.BufferedWriter(file),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=unbuffered,
            )
            setattr(sys, name, guarded)
