"""What a trained classifier says of new pictures: path, class and confidence of each, as a table.

    python scripts/predict.py --checkpoint checkpoint/cifar10-semi/exp/ckpt.pth.tar \\
        --images DIR --output predictions.csv

The checkpoint is one of `cifar-semi.py` or `imagenet-semi.py`; network, size of the images, gray or color
and the names of the classes are read from it. All pictures below DIR are classified, however deep their
folders are. --top 3 adds the second and third class and their confidences. --report adds, beside the
table, a contact sheet of the most and least confident pictures of each class, and a page that shows them.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import FileSet
from lib.cli import options
from lib.files.atomic import write_whole
from lib.runtime import devices
from lib.runtime.distributed import is_main, own_workers
from lib.training import prediction
from lib.training.prediction import Predictions


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="classifier of phase 3, last or best"
    )
    files.add_argument("--images", required=True, metavar="DIR", help="folder of pictures")
    files.add_argument("--output", default="predictions.csv", metavar="FILE", help="table to write")
    files.add_argument(
        "--report", action="store_true", help="contact sheets of each class and a page of them"
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="classes of each picture")
    parser.add_argument(
        "--architecture",
        "--arch",
        default="",
        metavar="NAME",
        help="network, for a checkpoint that does not say it (the published ones)",
    )
    parser.add_argument(
        "-b", "--batch-size", type=int, default=128, help="pictures at a time, of each process"
    )
    parser.add_argument(
        "-j",
        "--num-workers",
        type=int,
        default=2,
        help="processes that decode the pictures, on each machine",
    )
    options.add_compute(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.require_positive(args, "top", "batch_size")
    options.require_not_negative(args, "num_workers")
    options.warn_unused(args, build_parser(), "where nothing is random", "rng_seed")
    options.writable_folder("--output", Path(args.output).parent)
    if Path(args.output).is_dir():
        raise ValueError(f"--output {args.output}: is a folder; name a file in it")


def write_report(args: argparse.Namespace, predictions: Predictions, data: FileSet) -> Path:
    """`<name>_sheets/` and `<name>.html` beside the table; returns the page."""
    page = Path(args.output).with_suffix(".html")
    folder = page.with_name(f"{page.stem}_sheets")
    written = page.write_sheets(predictions.as_pseudo_labels(), data, folder)
    page.write_page(
        page,
        title="Predictions",
        facts={"checkpoint": args.checkpoint, "pictures": args.images},
        curves={},
        pictures={},
        sheets={"Classes": [(name, f"{folder.name}/{file}", n) for name, file, n in written]},
        heading="{}: most confident pictures above, least confident below",
    )
    return page


def main(args: argparse.Namespace) -> None:
    # 1. The classifier, and the pictures as it wants them
    check_options(args)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    classifier = prediction.load_classifier(args.checkpoint, args.architecture)
    data = prediction.pictures(args.images, classifier)
    if is_main():
        print(f"{device}; {len(data)} pictures, {len(classifier.classes)} classes")

    # 2. What it says
    predictions = prediction.predict(
        *(classifier, data, device),
        top=args.top,
        batch_size=args.batch_size,
        num_workers=own_workers(args.num_workers),
    )

    # 3. The table, and how it looks
    if is_main():
        text = prediction.table(data.paths, predictions, classifier.classes)
        # a file name need not be UTF-8, the table is
        write_whole(text.encode("utf-8", errors="backslashreplace"), Path(args.output))
        print(f"{args.output}: {len(data)} pictures")
        if args.report:
            print(f"report: {write_report(args, predictions, data)}")


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    options.run(main, build_parser())
