"""What is checked before any work: options that do not go together, or have no effect, and output folders.

The limits of single options are declared with them (`lib.runtime.option`) and checked as they are read.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lib.cli.declared import Parser, flag
from lib.features.backbones import is_external
from lib.labels.split import is_list, name_of
from lib.runtime import distributed
from lib.training.settings import INSTANCE, TWO_VIEW
from models import IMAGENET_ARCHITECTURES

# without effect where a checkpoint is measured
ONLY_TRAINING = ("loader", "compile", "cuda_graph", "profile")
# which pseudo-labels are trained on, and how much they count
OF_PSEUDO_LABELS = (
    "pseudo_ratio",
    "class_balanced",
    "confidence_weighted",
    "calibrated_weights",
    "labeled_share",
)
WITHOUT_FILES = ("patches", "dummy")  # data sets that need no folder
SMALLEST_SIDE = 33  # ImageNet's networks shrink 32 times, and BatchNorm needs more than one place


def check_common(args: argparse.Namespace) -> None:
    """Refuse combinations of the shared options that no run can work with."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if args.compile and not shutil.which(compiler):  # the one that torch.compile calls
        raise ValueError(
            "--compile needs a C++ compiler, and none was found: install g++ (on Debian and Ubuntu with "
            "apt install g++), or leave --compile out"
        )
    size = distributed.world_size()
    if args.batch_size % size:
        raise ValueError(
            f"--batch-size {args.batch_size}: cannot be shared equally by {size} processes; take "
            f"{max(1, args.batch_size // size) * size}"
        )


def check_pretraining(args: argparse.Namespace, parser: Parser) -> None:
    """Check the options of phase 1, and warn of options that have no effect."""
    check_common(args)
    if args.objective != INSTANCE:
        unused = ("low_dim", "nce_k", "nce_m", "nce_loss", "nce_z")
        unused += () if args.objective == TWO_VIEW else ("nce_t",)
        warn_unused(args, parser, f"with --objective {args.objective}", *unused)
    elif args.nce_k == 0:
        warn_unused(args, parser, "without --nce-k", "nce_loss", "nce_z")
    elif args.nce_loss != "nce":
        warn_unused(args, parser, f"with --nce-loss {args.nce_loss}", "nce_z")


def check_finetuning(args: argparse.Namespace, parser: Parser) -> None:
    """Check the options of phase 3, and warn of options that have no effect."""
    check_common(args)
    if args.eval and not (args.resume or args.pretrained):
        raise ValueError("--eval measures a checkpoint: name it with --resume FILE")
    if args.eval:
        warn_unused(args, parser, "with --eval", *ONLY_TRAINING)
    for option, file in (("--resume", args.resume), ("--pretrained", args.pretrained)):
        if file not in ("", "auto") and not Path(file).is_file():
            raise ValueError(f"{option} {file}: there is no such file")
    if args.pseudo_file and args.pseudo_dir:
        raise ValueError("--pseudo-file and --pseudo-dir both give pseudo-labels: name one of them")
    if args.consistency and not (args.pseudo_file or args.pseudo_dir):
        raise ValueError(
            "--consistency starts from the pseudo-labels of phase 2: name them with --pseudo-file FILE"
        )
    if args.consistency and args.loader == "workers":
        raise ValueError(
            "--consistency augments whole batches on the device: leave out --loader workers"
        )
    if args.consistency:
        warn_unused(args, parser, "with --consistency", *OF_PSEUDO_LABELS, "criterion")
    else:
        unused = "unlabeled_ratio", "strong_augmentation"
        warn_unused(args, parser, "without --consistency", *unused)
    if not (args.pseudo_file or args.pseudo_dir):
        warn_unused(args, parser, "without --pseudo-file or --pseudo-dir", *OF_PSEUDO_LABELS)
    if args.confidence_weighted and args.calibrated_weights:
        raise ValueError("--confidence-weighted and --calibrated-weights are two weights: name one")
    if not args.pseudo_dir:
        warn_unused(args, parser, "without --pseudo-dir", "pseudo_per_chunk")
    check_lists(args.num_labeled)
    if args.finetune and not (args.resume or args.pretrained):
        warn("--finetune without weights to start from trains on features of a random network")


def check_lists(*num_labeled: int | str) -> None:
    """Refuse lists of labeled images that are missing, or whose results would have the same name."""
    for given in filter(is_list, num_labeled):
        if not Path(str(given)).is_file():
            raise ValueError(
                f"--num-labeled {given}: there is no such file; scripts/choose.py makes a list"
            )
        same = [other for other in num_labeled if name_of(other) == name_of(given)]
        if len(same) > 1:
            raise ValueError(
                f"--num-labeled {same[0]} and {same[1]} would both write {name_of(given)}.pth.tar: rename one"
            )


def check_imagenet(args: argparse.Namespace, small: str, *, external_too: bool = False) -> None:
    """Refuse a missing folder of images, networks that are not for ImageNet, and images too small for them.

    The message names the script `small` for small images. `external_too` accepts networks of other
    libraries (`lib.features.backbones`).
    """
    if not args.data_dir and args.dataset not in WITHOUT_FILES:
        raise ValueError(
            "--data-dir is missing: name the folder that holds train/<class>/* and val/<class>/*"
        )
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


def keep_dummy_apart(args: argparse.Namespace, parser: Parser, *names: str) -> None:
    """Give a run on random images folders of its own, in place, unless the user names some."""
    for name in names if args.dataset == "dummy" else ():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, f"{parser.get_default(name)}-dummy")


def warn(text: str) -> None:
    """Print a warning, once for all processes."""
    if distributed.is_main():
        print(f"warning: {text}", file=sys.stderr)


def warn_unused(args: argparse.Namespace, parser: Parser, reason: str, *names: str) -> None:
    """Warn of each option in `names` that the user set although it has no effect, for the `reason`."""
    chosen = parser.chosen_defaults(args)
    for name in names:
        if getattr(args, name) != chosen.get(name, parser.get_default(name)):
            warn(f"{flag(name)} has no effect {reason}")


def writable_folder(option: str, path: str | Path) -> Path:
    """Make the folder `path` and prove that files can be written to it, before hours of training.

    The ValueError, if they cannot, names the option that gave the folder.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise ValueError(
            f"{option}: cannot write to the folder {path}: {error.strerror}"
        ) from error
