"""Early end of a run without any loss, after the step that is under way.

SIGTERM, Ctrl-C, SIGHUP, an output that nobody reads any more, and `--stop-after` ask for it.

In `with watch(...) as stop` a loop asks `stop.requested()` after every step, saves and ends. `stop.exit()`
follows that block.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lib.runtime import distributed, terminal

IMPATIENCE_S = 1.0  # a second Ctrl-C that comes sooner is the same one, passed on by the launcher


class Stop:
    """The decision to end a run, asked for once after every step; the same on every process."""

    def __init__(self, after: int = 0) -> None:
        self._after, self._steps = after, 0
        self._received, self._at = 0, 0.0  # signal that reached this process, and when
        self._agreed = 0  # signal that all processes know of
        self.reached = False  # answer of the last `requested`

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal by setting a flag; a second Ctrl-C, a while after the first, ends at once."""
        now = time.monotonic()
        if self._received and number == signal.SIGINT and now - self._at > IMPATIENCE_S:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._at = number, now

    def requested(self) -> bool:
        """Count a step and return whether a signal reached any process, or `after` steps are done."""
        self._steps += 1
        self._agreed = distributed.all_reduce_max(self._received)
        self.reached = bool(self._agreed) or self._steps == self._after
        return self.reached

    @property
    def reason(self) -> str:
        """Signal or option that ended the run, for its last message."""
        return signal.Signals(self._agreed).name if self._agreed else f"--stop-after {self._after}"

    def exit(self) -> None:
        """Exit with 128 + the signal that came, if one did, once rank 0, which saves, is here too.

        These are 143 (SIGTERM), 130 (SIGINT), 129 (SIGHUP) and 141 (SIGPIPE, for a closed output).
        """
        if self._agreed:
            distributed.barrier()
            sys.exit(128 + self._agreed)


@contextmanager
def watch(after: int = 0) -> Iterator[Stop]:
    """Keep signals and a closed output from ending this process inside the block; yield the `Stop` to ask.

    It stops after `after` steps of this start as well; 0 means never.
    """
    stop = Stop(after)
    ending = terminal.ending_signals()
    before = {number: signal.signal(number, stop.receive) for number in ending}
    try:
        with terminal.closing_told_to(stop.receive):
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
