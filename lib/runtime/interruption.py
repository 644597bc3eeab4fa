"""Ending a run early without losing anything: SIGTERM, Ctrl-C and `--stop-after` wait for the step to end.

with interruption.watch(after=args.stop_after) as stop:
    for step in steps:
        if stop.requested():
            save(...)
            break
stop.exit()
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lib.runtime import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IMPATIENCE_S = 1.0  # a Ctrl-C that comes sooner is the same one, passed on by the launcher


class Stop:
    """Whether the run shall end, asked once after every step; the same answer on every process."""

    def __init__(self, after: int = 0) -> None:
        self._after, self._steps = after, 0
        self._received, self._at = 0, 0.0  # by this process; which signal, when
        self._agreed = 0  # what all processes know of

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler: sets a flag. A second Ctrl-C, a while after the first, ends at once."""
        now = time.monotonic()
        if self._received and number == signal.SIGINT and now - self._at > IMPATIENCE_S:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._at = number, now

    def requested(self) -> bool:
        """Count a step; True if a signal reached any process, or the steps asked for are done."""
        self._steps += 1
        self._agreed = distributed.all_reduce_max(self._received)
        return bool(self._agreed) or self._steps == self._after

    @property
    def reason(self) -> str:
        """What ended the run, for its last message."""
        return signal.Signals(self._agreed).name if self._agreed else f"--stop-after {self._after}"

    def exit(self) -> None:
        """End the process with 143 (SIGTERM) or 130 (SIGINT); nothing where no signal was met.

        Call it when everything is saved: it waits for the process that does so.
        """
        if self._agreed:
            distributed.barrier()
            sys.exit(128 + self._agreed)


@contextmanager
def watch(after: int = 0) -> Iterator[Stop]:
    """Keep SIGTERM and SIGINT from ending this process inside the block.

    Args:
        after: steps of this start after which to stop as well; 0: never.

    Yields:
        The `Stop` to ask after each step.
    """
    stop = Stop(after)
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
