"""The log of a run: TensorBoard events, and one JSON object per line in `log.jsonl`."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from lib.runtime.distributed import is_main

Writer = Callable[..., None]  # function that logs an event: its name, the step, values
FLUSH_S = 30.0  # between the times that events are flushed to the disk, for TensorBoard to show


def _plain(value: Any) -> Any:
    """Replace every number that is not finite by None, inside dicts and lists too."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Lines:
    """The file `log.jsonl`, to which a resumed run appends after its last whole line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if self.path.is_file():  # a full disk, or a machine that went down, leaves half a line
            written = self.path.read_bytes()
            self._file.truncate(written.rfind(b"\n") + 1)

    def write(self, event: str, step: int | None, plain: dict[str, Any]) -> None:
        head = {"event": event, "time": round(time.time(), 3)}
        if step is not None:
            head["step"] = step
        self._file.write(json.dumps(head | plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Events:
    """An event file of TensorBoard, for the numbers of events with a step.

    It is written here and not by the thread of `tensorboardX.SummaryWriter`, which dies in silence on a full
    disk: the run would wait for it for ever.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.out.tfevents.*"
        self._file = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()

    def write(self, event: str, step: int | None, plain: dict[str, Any]) -> None:
        for name, value in plain.items() if step is not None else ():
            if isinstance(value, int | float) and not isinstance(value, bool):
                shown = scalar(f"{event}/{name}", value)
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=shown))
        if time.monotonic() - self._flushed > FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


class RunLog:
    """The log of one run in `folder`: TensorBoard events and `log.jsonl`, to which a resumed run appends.

    Numbers that are not finite become null, so that every line is valid JSON. A file that cannot be written
    any more is told once on standard error, and the run goes on without it.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._files = [_Lines(Path(folder)), _Events(Path(folder))]
        except OSError as error:
            raise ValueError(f"cannot write the log to {folder}: {error.strerror}") from error

    def write(self, event: str, step: int | None = None, **values: Any) -> None:
        """Append one line; the numbers of an event with a step go to TensorBoard too."""
        plain = _plain(values)
        for file in list(self._files):
            with self._or_without(file):
                file.write(event, step, plain)

    def close(self) -> None:
        for file in list(self._files):
            with self._or_without(file):
                file.close()

    @contextlib.contextmanager
    def _or_without(self, file: _Lines | _Events) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._files.remove(file)
            why = error.strerror or str(error)
            said = f"warning: cannot write {file.path}: {why}; training goes on without this log"
            print(said, file=sys.stderr, flush=True)
            # the same error again, of what is still to be written
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def main_log(folder: Path) -> Iterator[Writer]:
    """Open the run's log and yield its `write`; on ranks other than 0 a function that does nothing."""
    if not is_main():
        yield lambda *_, **__: None
        return
    with contextlib.closing(RunLog(folder)) as log:
        yield log.write
