"""The start of a script: its processes, its exit code, its folder, and the command that continues it."""

import argparse
import importlib.util
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from lib.cli.checks import warn, writable_folder
from lib.runtime import distributed, terminal

EXIT_FAILURE, EXIT_USAGE = 1, 2
LESS_MEMORY = (
    "Less memory is needed with a smaller --batch-size, in phase 2 with --chunks 10 or --block-mib 64; "
    "--gpus cpu takes that of the machine"
)
ROOT = Path(__file__).resolve().parents[2]


def resume_command(file: str | Path) -> str:
    """Return the command line of this process, changed to continue the checkpoint `file`."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--resume", "-r", "--stop-after"):
            next(words, None)
        elif not word.startswith(("--resume=", "--stop-after=")) and word != "--auto-resume":
            kept.append(word)
    start = "torchrun ..." if distributed.under_torchrun() else "python"
    return f"{start} {shlex.join([sys.argv[0], *kept, '--resume', str(file)])}"


def open_run_folder(option: str, folder: Path, last: str, *, is_new: bool) -> None:
    """Let rank 0 prove that a run can write to its folder, and warn of what a new run replaces there.

    The ValueError, if it cannot, names the option that gave the folder. `last` is the name of the checkpoint
    that a run writes again and again.
    """
    if not distributed.is_main():
        return
    writable_folder(option, folder)
    if is_new and (folder / last).is_file():
        warn(f"{folder / last} will be replaced by a new run; --resume auto continues it instead")


def _guarded(
    main: Callable[[argparse.Namespace], object], args: argparse.Namespace, prog: str
) -> int:
    """Run the main function of a script and return its exit code; an error ends in one message."""
    if not distributed.is_main():
        warnings.simplefilter("ignore", UserWarning)  # rank 0 shows the same ones
    try:
        main(args)
    except terminal.ClosedOutputError:  # nobody reads a message
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if not distributed.is_main():
            time.sleep(distributed.MAIN_FIRST_S)
        said = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):  # says nothing, or half a page
            said = ". ".join([*filter(None, said.split(". ")[:2]), LESS_MEMORY])
        print(f"{prog}: error: {said}", file=sys.stderr, flush=True)
        return EXIT_USAGE if isinstance(error, ValueError | OSError) else EXIT_FAILURE
    except KeyboardInterrupt:  # before training, or the second Ctrl-C: there is nothing to save
        return 128 + signal.SIGINT
    return 0


def run(main: Callable[[argparse.Namespace], object], options: argparse.ArgumentParser) -> None:
    """Parse the command line and run a script, in as many processes as `--gpus` or torchrun ask for.

    A mistake of the user ends in one message and exit code 2, and a run that diverges in one message and
    exit code 1. With `TRACEBACK=1` in the environment, the message comes with its traceback.
    """
    args = options.parse_args()
    work = partial(_guarded, main, args, options.prog)
    terminal.guard_outputs()
    gpus = getattr(args, "gpus", "cpu")
    try:
        code = distributed.run(work, gpus)
    except (ValueError, OSError) as error:  # no such device; no room for a rendezvous
        if os.environ.get("TRACEBACK"):
            raise
        options.exit(EXIT_USAGE, f"{options.prog}: error: {error}\n")
    sys.exit(code)


def load_script(name: str) -> ModuleType:
    """Import a script by its path from the root; `import` does not take names such as cifar-semi.py."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name[:-3]), ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the names in their annotations here
    spec.loader.exec_module(module)
    return module
