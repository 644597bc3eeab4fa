"""Options that the scripts share, in named groups, and the way a script is started."""

import argparse
import importlib.util
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from datasets import DATASETS
from lib.features.backbones import is_external
from lib.labels.split import parse_num_labeled
from lib.loading.batches import LOADERS
from lib.objectives.memory_bank import LOSSES
from lib.runtime import devices, distributed
from lib.runtime.devices import PRECISIONS, Device
from lib.runtime.profiling import COMPILE_MODES, WARM_UP, require_compiler
from lib.training.schedule import SCHEDULES
from models import IMAGENET_ARCHITECTURES, SMALL_ARCHITECTURES

Values = TypeVar("Values", bound=Any)
EXIT_FAILURE, EXIT_USAGE = 1, 2
ONLY_TRAINING = (
    "loader",
    "compile",
    "profile",
)  # options without effect where a checkpoint is measured
WITHOUT_FILES = ("patches", "dummy")  # data sets that no folder is needed for
SMALLEST_SIDE = 33  # ImageNet's networks shrink 32 times; BatchNorm needs more than one place
ROOT = Path(__file__).resolve().parents[2]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the script's docstring as it is and shows every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ""):
            return action.help
        return super()._get_help_string(action)


def parser(manual: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring; abbreviations of options are not guessed."""
    return argparse.ArgumentParser(description=manual, formatter_class=_Help, allow_abbrev=False)


def add_data(
    group_of: argparse.ArgumentParser, *aliases: str, workers: tuple[str, ...] = ()
) -> None:
    """The data set; `aliases` are other names of --data-dir, `workers` of --num-workers."""
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
        *("-j", "--num-workers", *workers),
        dest="num_workers",
        type=int,
        default=2,
        help="processes that decode image files (folder) or work for --loader workers, on each machine",
    )


def add_model(
    group_of: argparse.ArgumentParser, *aliases: str, known: str = SMALL_ARCHITECTURES
) -> argparse._ArgumentGroup:
    """The network; `aliases` are other names of --architecture, `known` says what it takes."""
    group = group_of.add_argument_group("network")
    group.add_argument(
        *("--architecture", "--arch", *aliases),
        default="wrn-28-2",
        metavar="NAME",
        help=known,
    )
    return group


def add_optimization(
    group_of: argparse.ArgumentParser, *aliases: str, lr: float
) -> argparse._ArgumentGroup:
    """The optimizer; `aliases` are other names of --lr."""
    group = group_of.add_argument_group("optimization")
    group.add_argument("--lr", *aliases, type=float, default=lr, help="highest learning rate")
    group.add_argument("--lr-scheduler", choices=SCHEDULES, default="cosine", help="schedule")
    group.add_argument("-b", "--batch-size", type=int, default=128, help="total batch size")
    group.add_argument("--weight-decay", "--wd", type=float, default=5e-4, help="L2 penalty of SGD")
    group.add_argument(
        "--iter-size",
        type=int,
        default=1,
        metavar="BATCHES",
        help="batches whose gradients are averaged for one step: steps as of a batch so many times as "
        "large, in the memory of one",
    )
    return group


def add_compute(group_of: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where and how to device."""
    group = group_of.add_argument_group("computing")
    group.add_argument(
        "--gpus",
        default="0",
        help="CUDA device numbers, a process each (0,1,2,3), or cpu (cpu,cpu: two processes); numbers "
        "without CUDA mean one process on the CPU. "
        "Under torchrun every process takes the device of its LOCAL_RANK",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 autocast where the hardware has it, else fp32",
    )
    group.add_argument("--rng-seed", type=int, default=0, help="seed of all that is random")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU too, the same command gives the same bits, at some loss of speed; on the CPU it "
        "does anyway",
    )
    return group


def add_training_compute(group_of: argparse.ArgumentParser) -> None:
    """`add_compute`, and what only training knows."""
    group = add_compute(group_of)
    group.add_argument(
        "--loader",
        choices=LOADERS,
        default=LOADERS[0],
        help="what augments training images. device: whole batches there, of images that lie there as bytes, "
        "or that --num-workers processes decode from files; workers: one image at a time, by torchvision on "
        "Pillow images in those processes, as published. Both draw from one distribution, but not the same "
        "numbers; workers is slower and there to compare",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        choices=COMPILE_MODES,
        const=COMPILE_MODES[0],
        default="",
        help="let torch.compile make the kernels: a minute or so at the start, then faster steps on a GPU; "
        "reduce-overhead also records them as CUDA graphs, which pays for small networks. Results differ "
        "in the last bits",
    )
    group.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help=f"trace so many steps, after {WARM_UP} to warm up, into the folder of the log, and print the "
        "costliest operations; 0: none",
    )


def select_training_device(args: argparse.Namespace) -> Device:
    """What the options of `add_training_compute` ask for."""
    return devices.select(args.gpus, args.precision, deterministic=args.deterministic)


def _add_memory_bank(group_of: argparse.ArgumentParser) -> None:
    group = group_of.add_argument_group("memory bank")
    group.add_argument(
        "--nce-k", type=int, default=0, help="negatives per image; 0: softmax over all images"
    )
    group.add_argument("--nce-t", type=float, default=0.1, help="temperature")
    group.add_argument("--nce-m", type=float, default=0.5, help="momentum of the bank's rows")
    group.add_argument(
        "--nce-loss",
        choices=LOSSES,
        default="nce",
        help="loss over --nce-k negatives: the published NCE, or softmax cross-entropy",
    )
    group.add_argument(
        "--nce-z",
        choices=("moving-average", "first-batch"),
        default="moving-average",
        help="normalizer of NCE: momentum 0.99, or estimated once as published",
    )


def add_stopping(group_of: argparse.ArgumentParser) -> None:
    group = group_of.add_argument_group("stopping")
    group.add_argument(
        "--stop-after",
        type=int,
        default=0,
        metavar="STEPS",
        help="save and stop after so many steps of this start, to be continued by --resume auto; 0: run "
        "to the end. SIGTERM and Ctrl-C stop in the same way, after the step at hand",
    )


def pretraining_parser(
    manual: str | None, *, architectures: str = SMALL_ARCHITECTURES
) -> argparse.ArgumentParser:
    """The options of phase 1, with the defaults of `unsupervised/cifar.py`."""
    options = parser(manual)
    add_data(options, "--dataDir", workers=("--workers",))
    network = add_model(options, "-a", known=architectures)
    network.add_argument("--low-dim", type=int, default=128, help="dimensions of the embedding")
    optimization = add_optimization(options, "--learning-rate", lr=0.03)
    optimization.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    optimization.add_argument("--epochs", type=int, default=600, help="passes over the images")
    _add_memory_bank(options)
    add_training_compute(options)
    add_stopping(options)
    files = options.add_argument_group("files")
    files.add_argument(
        "--model-dir", "--modelDir", default="./checkpoint/instance_cifar10", help="checkpoints"
    )
    files.add_argument(
        "--log-dir",
        "--logDir",
        default="./tensorboard/instance_cifar10",
        help="TensorBoard and log.jsonl",
    )
    files.add_argument(
        *("--resume", "-r"),
        default="",
        metavar="FILE",
        help="continue this checkpoint; auto: the newest of --model-dir, or a new run",
    )
    files.add_argument(
        "--test-only",
        action="store_true",
        help="measure the kNN accuracy of --resume on a bank recomputed from all training images",
    )
    return options


def check_pretraining(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that no run of phase 1 can work with, and name options that have no effect."""
    check_common(args)
    require_positive(args, "epochs", "iter_size", "low_dim", "nce_t")
    require_not_negative(args, "nce_k", "stop_after")
    for name in ("nce_m", "momentum"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} {getattr(args, name)}: must lie in [0, 1)")
    if args.nce_k == 0:
        warn_unused(args, parser, "without --nce-k", "nce_loss", "nce_z")
    elif args.nce_loss != "nce":
        warn_unused(args, parser, f"with --nce-loss {args.nce_loss}", "nce_z")


def finetuning_parser(
    manual: str | None, *, resumes: str, architectures: str = SMALL_ARCHITECTURES
) -> argparse.ArgumentParser:
    """The options of phase 3, with the defaults of `cifar-semi.py`.

    Args:
        resumes: what --resume takes, for its help.
        architectures: what --architecture takes, for its help.
    """
    options = parser(manual)
    add_data(options, "--data_dir", "--dataDir")
    network = add_model(options, known=architectures)
    network.add_argument("--finetune", action="store_true", help="train the last layer only")
    network.add_argument(
        "--input-gray", action="store_true", help="gray input, for a colorization backbone"
    )
    network.add_argument(
        "--pretrained",
        default="",
        metavar="FILE",
        help="weights to start from: of phase 1 (its last layer is left out), or of a classifier (the last "
        "layer too where it is for these classes)",
    )
    network.add_argument(
        "--resume",
        "-r",
        default="",
        metavar="FILE",
        help=f"{resumes}; auto: the newest checkpoint of this run that can be read, if there is one",
    )
    _add_steps(options)
    _add_labels(options)
    add_training_compute(options)
    add_stopping(options)
    _add_run_files(options)
    return options


def _add_steps(group_of: argparse.ArgumentParser) -> None:
    group = add_optimization(group_of, lr=0.01)
    group.add_argument("--max-iters", type=int, default=500000, help="optimizer steps")
    group.add_argument(
        "--criterion",
        choices=("CrossEntropyLoss", "MultiMarginLoss"),
        default="CrossEntropyLoss",
        help="loss of torch.nn",
    )


def _add_run_files(group_of: argparse.ArgumentParser) -> None:
    group = group_of.add_argument_group("files")
    group.add_argument("--model-root", default="./checkpoint/cifar10-semi", help="checkpoints")
    group.add_argument(
        "--log-root", default="./tensorboard/cifar10-semi", help="TensorBoard and log.jsonl"
    )
    group.add_argument("--exp-name", default="exp", help="folder below both of them")
    group.add_argument("--eval", action="store_true", help="only measure --resume or --pretrained")
    group.add_argument("--eval-freq", type=int, default=500, help="steps between tests and saves")
    group.add_argument("--print-freq", type=int, default=100, help="steps between lines")


def _add_labels(group_of: argparse.ArgumentParser) -> None:
    group = group_of.add_argument_group("labels")
    group.add_argument(
        "--num-labeled",
        type=num_labeled,
        default=500,
        metavar="N",
        help="labeled images, equally many of each class; all: every image that has a label",
    )
    group.add_argument(
        "--pseudo-file",
        default="",
        metavar="FILE",
        help="pseudo-labels of phase 2; neither this nor --pseudo-dir: supervised baseline",
    )
    group.add_argument(
        "--pseudo-dir",
        default="",
        metavar="DIR",
        help="pseudo-labels in chunks, DIR/10_0.pth.tar ... DIR/10_9.pth.tar: the whole of one set",
    )
    group.add_argument(
        "--pseudo-ratio", type=float, default=1, help="most confident share of them to use"
    )
    group.add_argument(
        "--pseudo-per-chunk",
        action="store_true",
        help="take that share of every chunk, as published, instead of one ranking of them all",
    )
    group.add_argument(
        "--class-balanced",
        action="store_true",
        help="take that share of each class instead of one ranking",
    )
    group.add_argument(
        "--confidence-weighted",
        action="store_true",
        help="weight the loss of each pseudo-labeled image by its confidence, as in the paper",
    )


def resume_command(file: str | Path) -> str:
    """The command line that started this process, made to continue the checkpoint `file`."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--resume", "-r", "--stop-after"):
            next(words, None)
        elif not word.startswith(("--resume=", "--stop-after=")) and word != "--auto-resume":
            kept.append(word)
    start = "torchrun ..." if distributed.under_torchrun() else "python"
    return f"{start} {shlex.join([sys.argv[0], *kept, '--resume', str(file)])}"


def values(args: argparse.Namespace, kind: type[Values]) -> Values:
    """A dataclass whose fields are named as options, with what the user gave them."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def add_dummy(parser: argparse.ArgumentParser) -> None:
    """`--dummy`, for the scripts that read images from files."""
    parser.add_argument(
        "--dummy",
        dest="dataset",
        action="store_const",
        const="dummy",
        default=argparse.SUPPRESS,  # that of --dataset
        help="--dataset dummy: random images made on the fly, to measure the speed without data; the default "
        "folders get -dummy at the end",
    )


def require_data_dir(args: argparse.Namespace) -> None:
    """Raise ValueError where the images lie in a folder and none is named."""
    if not args.data_dir and args.dataset not in WITHOUT_FILES:
        raise ValueError(
            "--data-dir is missing: name the folder that holds train/<class>/* and val/<class>/*"
        )


def require_imagenet_network(
    args: argparse.Namespace, small: str, *, external_too: bool = False
) -> None:
    """Raise ValueError where no network for ImageNet can be made, or none for images of that size.

    Args:
        small: the script for small images.
        external_too: whether networks of `lib.features.backbones` will do.
    """
    external = external_too and is_external(args.architecture)
    if args.architecture not in IMAGENET_ARCHITECTURES and not external:
        known = ", ".join(IMAGENET_ARCHITECTURES)
        raise ValueError(
            f"--arch {args.architecture}: take one of {known}; for small images there is {small}"
        )
    if args.image_size < SMALLEST_SIDE:
        raise ValueError(
            f"--image-size {args.image_size}: these networks take {SMALLEST_SIDE} pixels at least; for "
            f"small images there is {small}"
        )


def keep_dummy_apart(
    args: argparse.Namespace, parser: argparse.ArgumentParser, *names: str
) -> None:
    """Give a run without data its own folders, where the user names none: not those of real runs.

    Args:
        names: the options for folders, replaced in `args` where they have their defaults.
    """
    for name in names if args.dataset == "dummy" else ():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, f"{parser.get_default(name)}-dummy")


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
    require_not_negative(args, "num_workers", "weight_decay", "rng_seed", "profile")
    if args.compile:
        require_compiler()
    if args.rng_seed >= 2**63:
        raise ValueError(f"--rng-seed {args.rng_seed}: must be below 2**63")
    size = distributed.share().size
    if args.batch_size % size:
        raise ValueError(
            f"--batch-size {args.batch_size}: cannot be shared equally by {size} processes; take "
            f"{max(1, args.batch_size // size) * size}"
        )


def check_finetuning(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options of phase 3 that no run can work with; say which have no effect."""
    check_common(args)
    require_positive(args, "max_iters", "iter_size", "eval_freq", "print_freq")
    require_not_negative(args, "stop_after")
    require_share(args, "pseudo_ratio")
    if args.eval and not (args.resume or args.pretrained):
        raise ValueError("--eval measures a checkpoint: name it with --resume FILE")
    if args.eval:
        warn_unused(args, parser, "with --eval", *ONLY_TRAINING)
    if args.pretrained and not Path(args.pretrained).is_file():
        raise ValueError(f"--pretrained {args.pretrained}: there is no such file")
    if args.pseudo_file and args.pseudo_dir:
        raise ValueError("--pseudo-file and --pseudo-dir both give pseudo-labels: name one of them")
    if not (args.pseudo_file or args.pseudo_dir):
        unused = ("pseudo_ratio", "confidence_weighted", "class_balanced")
        warn_unused(args, parser, "without --pseudo-file or --pseudo-dir", *unused)
    if not args.pseudo_dir:
        warn_unused(args, parser, "without --pseudo-dir", "pseudo_per_chunk")
    if args.finetune and not (args.resume or args.pretrained):
        warn("--finetune without weights to start from trains on features of a random network")


def warn(text: str) -> None:
    """Tell the user of something that will not stop the run."""
    if distributed.is_main():
        print(f"warning: {text}", file=sys.stderr)


def warn_unused(
    args: argparse.Namespace, parser: argparse.ArgumentParser, reason: str, *names: str
) -> None:
    """Say which of the options `names` the user set although `reason` leaves them without effect."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            warn(f"{flag(name)} has no effect {reason}")


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


def open_run_folder(option: str, folder: Path, last: str, *, is_new: bool) -> None:
    """Rank 0 proves that a run can write to its folder, and says what a new run will replace there.

    Args:
        option: the one that gave the folder.
        last: name of the checkpoint that a run keeps writing.
        is_new: it does not continue a checkpoint.

    Raises:
        ValueError: naming the option.
    """
    if not distributed.is_main():
        return
    writable_folder(option, folder)
    if is_new and (folder / last).is_file():
        warn(f"{folder / last} will be replaced by a new run; --resume auto continues it instead")


def _guarded(
    main: Callable[[argparse.Namespace], object], args: argparse.Namespace, prog: str
) -> int:
    """The exit code of a script's main function; mistakes and divergence end in one message."""
    if not distributed.is_main():
        warnings.simplefilter("ignore", UserWarning)  # rank 0 says the same
    try:
        main(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if not distributed.is_main():
            time.sleep(distributed.MAIN_FIRST_S)
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE if isinstance(error, FloatingPointError) else EXIT_USAGE
    except KeyboardInterrupt:  # before training, or the second one: there is nothing to be saved
        return 128 + signal.SIGINT
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
