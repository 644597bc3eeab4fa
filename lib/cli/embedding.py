"""Options that name the features of phase 2, and the features and images that they name."""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from datasets import DataSet, build_datasets
from lib.cli import checks
from lib.cli.declared import Parser
from lib.features import extraction
from lib.features.backbones import is_external
from lib.features.extraction import FeatureSet
from lib.report import page
from lib.runtime.devices import Device
from lib.runtime.option import option, redeclared
from lib.training.shared_settings import Data, Network
from models import SMALL_ARCHITECTURES


@dataclass(frozen=True)
class Embedding(Data, Network):
    GROUP: ClassVar[str] = "network"

    data_dir: str = redeclared(Data, "data_dir", "--data_dir")
    image_size: int | None = redeclared(Data, "image_size", default=None)
    architecture: str = redeclared(
        Network,
        "architecture",
        default="",
        help=f"network, where --checkpoint does not name it: {SMALL_ARCHITECTURES}; or one from elsewhere, "
        "with images as its own configuration wants them: torchvision:NAME, torchvision:NAME@WEIGHTS, "
        "timm:NAME",
    )
    checkpoint: str = option(
        "",
        metavar="FILE",
        help="checkpoint of phase 1; with a network from elsewhere its weights (default: the library's own)",
    )
    features: str = option("", metavar="FILE", help="feature file, in place of --checkpoint")


def check_source(args: argparse.Namespace, parser: Parser) -> None:
    """Refuse none or two sources of features, and warn of options that have no effect on the one."""
    external = is_external(args.architecture)
    if bool(args.features) == bool(args.checkpoint or external):
        raise ValueError(
            "give --checkpoint FILE (of phase 1), --features FILE or --arch torchvision:NAME, one of them"
        )
    if external:
        why = "with a network from elsewhere, which has its own"
        checks.warn_unused(args, parser, why, "image_size")


def load(args: argparse.Namespace, device: Device, *, normalize: bool = True) -> FeatureSet:
    """Read the features, or extract them once and keep them beside the checkpoint."""
    return extraction.load_or_extract(
        features=args.features,
        normalize=normalize,
        checkpoint_file=args.checkpoint,
        architecture=args.architecture,
        dataset=args.dataset,
        data_dir=args.data_dir,
        image_size=args.image_size,
        num_workers=args.num_workers,
        device=device,
    )


def images_of(args: argparse.Namespace, found: FeatureSet) -> tuple[DataSet | None, DataSet | None]:
    """Find the images that the features are of, and the test images; warn where they are not at hand."""
    side = page.MOST_SIDE if args.dataset == "folder" else extraction.SMALL_SIZE
    try:
        data, test = build_datasets(
            args.dataset,
            args.data_dir,
            image_size=args.image_size or side,
            num_workers=args.num_workers,
            in_memory=False,  # a folder's images are read where a sheet shows them
        )
    except ValueError as error:
        checks.warn(f"no contact sheets without the images: {error}")
        return None, None
    # The digest of a folder depends on how it is read: features of the same images may have another one.
    recorded = "" if args.dataset == "folder" else found.digest
    if len(data) != len(found.features) or (recorded and recorded != data.digest):
        checks.warn(
            "no contact sheets: the features are not of this data set (--dataset, --data-dir, --image-size)"
        )
        return None, None
    return data, test
