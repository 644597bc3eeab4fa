"""Options that the scripts share, in named groups, and the way a script is started."""

import argparse
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from datasets import DATASETS
from lib import distributed
from lib.devices import PRECISIONS
from lib.schedule import SCHEDULES
from lib.split import parse_num_labeled
from models import SMALL_ARCHITECTURES

EXIT_FAILURE, EXIT_USAGE = 1, 2
ROOT = Path(__file__).resolve().parents[1]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the script's docstring as it is and shows every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ""):
            return action.help
        return super()._get_help_string(action)


def parser(manual: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring; abbreviations of options are not guessed."""
    return argparse.ArgumentParser(description=manual, formatter_class=_Help, allow_abbrev=False)


def add_data(group_of: argparse.ArgumentParser, *aliases: str) -> None:
    group = group_of.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default="cifar10",
        help="patches is embedded and needs no download; folder is your own images: DIR/train/<class>/*, "
        "DIR/test/<class>/* and, without labels, DIR/unlabeled/**",
    )
    group.add_argument(
        "--data-dir", *aliases, dest="data_dir", default="./data", help="where the data set lies"
    )
    group.add_argument("--image-size", type=int, default=32, help="side of the images in pixels")
    group.add_argument(
        "-j",
        "--num-workers",
        type=int,
        default=2,
        help="processes that decode image files (folder)",
    )


def add_model(group_of: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = group_of.add_argument_group("network")
    group.add_argument(
        "--architecture", "--arch", default="wrn-28-2", metavar="NAME", help=SMALL_ARCHITECTURES
    )
    return group


def add_optimization(group_of: argparse.ArgumentParser, *, lr: float) -> argparse._ArgumentGroup:
    group = group_of.add_argument_group("optimization")
    group.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    group.add_argument("--lr-scheduler", choices=SCHEDULES, default="cosine", help="schedule")
    group.add_argument("-b", "--batch-size", type=int, default=128, help="total batch size")
    group.add_argument("--weight-decay", "--wd", type=float, default=5e-4, help="L2 penalty of SGD")
    return group


def add_compute(group_of: argparse.ArgumentParser) -> None:
    group = group_of.add_argument_group("computing")
    group.add_argument(
        "--gpus",
        default="0",
        help="CUDA device numbers, a process each (0,1,2,3), or cpu; without CUDA always the CPU. "
        "Under torchrun every process takes the device of its LOCAL_RANK",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 autocast where the hardware has it, else fp32",
    )
    group.add_argument("--rng-seed", type=int, default=0, help="seed of all that is random")


def num_labeled(text: str) -> int | str:
    """`parse_num_labeled` as argparse wants it: its message reaches the user."""
    try:
        return parse_num_labeled(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(name: str) -> str:
    """What the user typed for `args.name`."""
    return "--" + name.replace("_", "-")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError naming the options among `names` whose value is not positive and finite."""
    _require(args, names, lambda value: 0 < value < math.inf, "must be positive")


def require_not_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError naming the options among `names` whose value is negative or not finite."""
    _require(args, names, lambda value: 0 <= value < math.inf, "must not be negative")


def require_share(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError naming the options among `names` whose value is not in [0, 1]."""
    _require(args, names, lambda value: 0 <= value <= 1, "must lie in [0, 1]")


def _require(
    args: argparse.Namespace, names: tuple[str, ...], good: Callable[[float], bool], rule: str
) -> None:
    wrong = [f"{flag(n)} {getattr(args, n)}" for n in names if not good(getattr(args, n))]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: {rule}")


def check_common(args: argparse.Namespace) -> None:
    """Refuse values of the shared options that no run can work with."""
    require_positive(args, "lr", "batch_size", "image_size")
    require_not_negative(args, "num_workers", "weight_decay", "rng_seed")
    if args.rng_seed >= 2**63:
        raise ValueError(f"--rng-seed {args.rng_seed}: must be below 2**63")


def warn_unused(
    args: argparse.Namespace, parser: argparse.ArgumentParser, reason: str, *names: str
) -> None:
    """Say which of the options `names` the user set although `reason` leaves them without effect."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            print(f"warning: {flag(name)} has no effect {reason}", file=sys.stderr)


def writable_folder(option: str, path: str | Path) -> Path:
    """The folder `path`, made where it is missing and proved to take files: before hours of training.

    Raises:
        ValueError: naming the option that gave it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise ValueError(
            f"{option}: cannot write to the folder {path}: {error.strerror}"
        ) from error


def _guarded(
    main: Callable[[argparse.Namespace], object], args: argparse.Namespace, prog: str
) -> int:
    """The exit code of a script's main function; mistakes and divergence end in one message."""
    try:
        main(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if not distributed.is_main():
            time.sleep(distributed.MAIN_FIRST_S)
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE if isinstance(error, FloatingPointError) else EXIT_USAGE
    return 0


def run(main: Callable[[argparse.Namespace], object], options: argparse.ArgumentParser) -> None:
    """Parse the command line and run, in as many processes as `--gpus` or torchrun ask for.

    A user's mistake ends in one message and exit code 2, a run that diverges in one message and exit
    code 1. `TRACEBACK=1` in the environment shows where a message came from.
    """
    args = options.parse_args()
    work = partial(_guarded, main, args, options.prog)
    gpus = getattr(args, "gpus", "cpu")
    try:
        distributed.device_names(gpus)
    except ValueError as error:
        options.exit(EXIT_USAGE, f"{options.prog}: error: {error}\n")
    sys.exit(distributed.run(work, gpus))


def load_script(name: str) -> ModuleType:
    """A script of this repository as a module, for who starts many of its runs in one process.

    Args:
        name: path from the root, such as `cifar-semi.py`, which is no name that `import` can say.
    """
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", name[:-3]), ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(module)
    return module
