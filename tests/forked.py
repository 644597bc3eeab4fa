"""Scripts as processes of their own that import nothing: each is forked from a server that did so once.

What signals, exit codes and `--resume` are asked about is that of a process started from the shell; only the
three seconds of imports are shared, so that a test can afford twenty starts.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import ROOT

from lib.cli import start

NAMES = (
    *("unsupervised/cifar.py", "unsupervised/imagenet.py", "cifar-semi.py", "imagenet-semi.py"),
    *("scripts/propagate.py", "scripts/predict.py"),
)
SCRIPTS = {name: start.load_script(name) for name in NAMES}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["forked", "faults"])
LONGEST_S = (
    120.0  # for anything that a test waits for; a promise of its own is asserted by the test
)


def _serve() -> None:
    """Start the server where it does not run yet; before Python 3.12 it does not get our sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
        forkserver.ensure_running()


def _begin(
    name: str,
    words: list[str],
    output: str,
    environment: dict[str, str],
    fault: Callable[[], None] | None,
) -> None:
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as from the shell; it inherits the server's
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [str(ROOT / name), *words]
    os.chdir(ROOT)
    if fault is not None:
        fault()
    start.run(SCRIPTS[name].main, SCRIPTS[name].build_parser())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Running:
    """A script that was started with the words of a command line; its output goes to a file.

    `fault` is called in its process before it begins: a function of `faults.py`, with its parameters.
    """

    def __init__(
        self,
        name: str,
        *words: object,
        output: Path,
        fault: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        self.output = output
        _serve()
        given = (name, [str(word) for word in words], str(output), environment, fault)
        self._process = SERVER.Process(target=_begin, args=given)
        self._process.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, which it must while the script runs."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            assert self._process.exitcode is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)

    def handles(self, number: signal.Signals) -> bool:
        """Whether the script has a handler of its own for a signal by now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(mask, 16) >> (number - 1) & 1)

    def send(self, number: signal.Signals) -> None:
        """Nothing where the script has ended by itself."""
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def children(self) -> list[int]:
        pid = self._process.pid
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def outlived_by(self, pids: list[int]) -> list[int]:
        """Those of its processes that are still there although it has ended; they get ten seconds."""
        deadline = time.monotonic() + 10
        while any(map(_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [pid for pid in pids if _alive(pid)]

    def end(self) -> tuple[int, str, float]:
        """Exit code, output, and the seconds that it took from now."""
        start = time.monotonic()
        self._process.join(LONGEST_S)
        assert self._process.exitcode is not None, f"still running: {self.said}"
        return self._process.exitcode, self.said, time.monotonic() - start
