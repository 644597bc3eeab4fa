"""Classify new pictures with a trained classifier, and write path, class and confidence of each as a table.

    python scripts/predict.py --checkpoint checkpoint/cifar10-semi/exp/ckpt.pth.tar \\
        --images DIR --output predictions.csv

The checkpoint is one of `cifar-semi.py` or `imagenet-semi.py`, which records the network, the size of the
images, gray or color, and the class names. All pictures below DIR are classified, at any depth. --top 3 adds
the second and third class and their confidences. --report adds a contact sheet of the most and least
confident pictures of each class, and a page that shows them, in the folder of the table.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import FileSet
from lib.cli import checks, declared, start
from lib.files.atomic import write_whole
from lib.report import page
from lib.runtime import devices
from lib.runtime.distributed import is_main, own_workers
from lib.training import prediction
from lib.training.prediction import Predictions
from lib.training.shared_settings import Compute


def build_parser() -> declared.Parser:
    parser = declared.parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="classifier of phase 3, last or best"
    )
    files.add_argument("--images", required=True, metavar="DIR", help="folder of pictures")
    files.add_argument("--output", default="predictions.csv", metavar="FILE", help="table to write")
    files.add_argument(
        "--report", action="store_true", help="contact sheets of each class and a page of them"
    )
    parser.add_argument(
        "--top", type=declared.positive_int, default=1, metavar="K", help="classes of each picture"
    )
    parser.add_argument(
        "--architecture",
        "--arch",
        default="",
        metavar="NAME",
        help="network, for a checkpoint that does not name it (the published ones)",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=declared.batch_size,
        default=128,
        help="pictures at a time, of each process",
    )
    parser.add_argument(
        "-j",
        "--num-workers",
        type=declared.num_workers,
        default=2,
        help="processes that decode the pictures, on each machine",
    )
    declared.add_options(parser, Compute)
    return parser


def check_options(args: argparse.Namespace) -> None:
    checks.warn_unused(args, build_parser(), "where nothing is random", "rng_seed")
    checks.writable_folder("--output", Path(args.output).parent)
    if Path(args.output).is_dir():
        raise ValueError(f"--output {args.output}: is a folder; name a file in it")


def write_report(args: argparse.Namespace, predictions: Predictions, data: FileSet) -> Path:
    """Write `<name>_sheets/` and `<name>.html` beside the table, and return the path of the page."""
    path = Path(args.output).with_suffix(".html")
    folder = path.with_name(f"{path.stem}_sheets")
    written = page.write_sheets(predictions.as_pseudo_labels(), data, folder)
    page.write_page(
        path,
        title="Predictions",
        facts={"checkpoint": args.checkpoint, "pictures": args.images},
        curves={},
        pictures={},
        sheets={"Classes": [(name, f"{folder.name}/{file}", n) for name, file, n in written]},
        heading="{}: most confident pictures above, least confident below",
    )
    return path


def main(args: argparse.Namespace) -> None:
    # 1. Classifier and pictures
    check_options(args)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    classifier = prediction.load_classifier(args.checkpoint, args.architecture)
    data = prediction.pictures(args.images, classifier)
    if is_main():
        print(f"{device}; {len(data)} pictures, {len(classifier.description.classes)} classes")

    # 2. Predictions
    predictions = prediction.predict(
        classifier,
        data,
        device,
        top=args.top,
        batch_size=args.batch_size,
        num_workers=own_workers(args.num_workers),
    )

    # 3. Table and report
    if is_main():
        text = prediction.table(data.paths, predictions, classifier.description.classes)
        # file names may not be valid UTF-8, but the table is
        write_whole(text.encode("utf-8", errors="backslashreplace"), Path(args.output))
        print(f"{args.output}: {len(data)} pictures")
        if args.report:
            print(f"report: {write_report(args, predictions, data)}")


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    start.run(main, build_parser())
