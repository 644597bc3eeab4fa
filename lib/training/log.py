"""The log of a run: TensorBoard events, and one JSON object per line in `log.jsonl`."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from lib.runtime.distributed import is_main

Writer = Callable[..., None]  # function that logs an event: its name, the step, values


def _plain(value: Any) -> Any:
    """Replace every number that is not finite by None, inside dicts and lists too."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """The log of one run in `folder`: TensorBoard events and `log.jsonl`, to which a resumed run appends.

    Numbers that are not finite become null, so that every line is valid JSON.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lines = open(self.folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"cannot write the log to {folder}: {error.strerror}") from error
        self._board = SummaryWriter(str(self.folder))

    def write(self, event: str, step: int | None = None, **values: Any) -> None:
        """Append one line; the numbers of an event with a step go to TensorBoard too."""
        plain = _plain(values)
        head = {"event": event, "time": round(time.time(), 3)}
        if step is not None:
            head["step"] = step
        self._lines.write(json.dumps(head | plain, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in plain.items() if step is not None else ():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


@contextmanager
def main_log(folder: Path) -> Iterator[Writer]:
    """Open the run's log and yield its `write`; on ranks other than 0 a function that does nothing."""
    if not is_main():
        yield lambda *_, **__: None
        return
    with closing(RunLog(folder)) as log:
        yield log.write
