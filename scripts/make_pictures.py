"""Make a folder of picture files to try the scripts on: the embedded patches as PNG and JPEG.

    python scripts/make_pictures.py --output DIR

By default the folders are those of `--dataset folder`: DIR/train/<class>/ with a few labeled pictures of
each class, DIR/unlabeled/album-<k>/ with the other training pictures in random order, DIR/test/<class>/ with
test pictures. With --layout csv all pictures lie in DIR/pictures/, and DIR/labels.csv has the columns path,
label (empty if there is none) and split (train or test).
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from tqdm import tqdm

from datasets.images import ImageSet
from datasets.patches import TEST_PER_CLASS, TRAIN_PER_CLASS, load_patches
from lib.cli import checks, declared, start
from lib.labels.split import labeled_split

ALBUM = 100  # pictures in each folder without labels
JPEG_QUALITY = 95


class Picture(NamedTuple):
    """One file to write: path without extension, image, class name (empty for no label) and split."""

    path: str
    image: torch.Tensor
    label: str
    split: str


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make; must be new"
    )
    parser.add_argument(
        "--layout", choices=("folders", "csv"), default="folders", help="how labels are told"
    )
    parser.add_argument(
        "--labeled", type=declared.positive_int, default=5, help="labeled pictures of each class"
    )
    parser.add_argument(
        "--unlabeled",
        type=declared.positive_int,
        default=200,
        help="training pictures of each class without a label",
    )
    parser.add_argument(
        "--test", type=declared.positive_int, default=50, help="test pictures of each class"
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    if args.labeled + args.unlabeled > TRAIN_PER_CLASS or args.test > TEST_PER_CLASS:
        raise ValueError(
            f"there are {TRAIN_PER_CLASS} training pictures of each class, --labeled and --unlabeled "
            f"together, and {TEST_PER_CLASS} for --test"
        )
    if Path(args.output).exists():
        raise ValueError(f"--output {args.output}: is there already; name a new folder")


def drawn(data: ImageSet, per_class: int) -> torch.Tensor:
    """Draw the indexes of `per_class` pictures of each class, class by class."""
    return labeled_split(data.targets, per_class * data.num_classes, data.num_classes).labeled


def with_class(data: ImageSet, indexes: torch.Tensor, split: str, layout: str) -> list[Picture]:
    pictures = []
    for number, index in enumerate(indexes.tolist()):
        name = data.classes[int(data.targets[index])]
        folder = f"{split}/{name}" if layout == "folders" else f"pictures/{split}"
        pictures.append(Picture(f"{folder}/{number:04d}", data.images[index], name, split))
    return pictures


def without_class(data: ImageSet, indexes: torch.Tensor, layout: str) -> list[Picture]:
    """Return pictures without label in random order, divided into albums."""
    order = torch.randperm(len(indexes), generator=torch.Generator().manual_seed(0))
    root = "unlabeled" if layout == "folders" else "pictures"
    return [
        Picture(
            f"{root}/album-{place // ALBUM}/{place % ALBUM:04d}", data.images[index], "", "train"
        )
        for place, index in enumerate(indexes[order].tolist())
    ]


def write(picture: Picture, number: int, root: Path) -> str:
    """Write a picture, every other one as JPEG, else as PNG, and return its path below `root`."""
    path = picture.path + (".jpg" if number % 2 else ".png")
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    # PNG ignores the quality
    image = Image.fromarray(picture.image.permute(1, 2, 0).numpy())
    image.save(root / path, quality=JPEG_QUALITY)
    return path


def write_all(pictures: list[Picture], root: Path, layout: str) -> None:
    rows = []
    for number, picture in enumerate(tqdm(pictures, desc="pictures", leave=False, disable=None)):
        rows.append((write(picture, number, root), picture.label, picture.split))
    if layout == "csv":
        with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])


def main(args: argparse.Namespace) -> None:
    check_options(args)
    root = Path(args.output)
    train, test = load_patches(train=True), load_patches(train=False)
    labeled = drawn(train, args.labeled)
    both = drawn(train, args.labeled + args.unlabeled)
    pictures = [
        *with_class(train, labeled, "train", args.layout),
        *without_class(train, both[~torch.isin(both, labeled)], args.layout),
        *with_class(test, drawn(test, args.test), "test", args.layout),
    ]
    parent = checks.writable_folder("--output", root.parent)
    with tempfile.TemporaryDirectory(
        dir=parent
    ) as made:  # the rename makes the folder appear complete
        (Path(made) / "pictures").mkdir()
        write_all(pictures, Path(made) / "pictures", args.layout)
        (Path(made) / "pictures").rename(root)
    print(
        f"{root}: {len(pictures)} pictures of {train.num_classes} classes, {len(labeled)} labeled"
    )


if __name__ == "__main__":
    start.run(main, build_parser())
