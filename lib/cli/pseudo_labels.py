"""Turn a pseudo-label file into a CSV table, and a table back into a file.

    python -m lib.cli.pseudo_labels to-csv checkpoint/pseudos/mine/250.pth.tar 250.csv
    python -m lib.cli.pseudo_labels from-csv 250.csv checkpoint/pseudos/mine/250.pth.tar

The table has the columns index (into the training set), path, label (a class name where the file knows them,
else a number) and confidence. The images whose true labels were used have a row without confidence. A table
of another tool may have its rows in any order and further columns; path may be missing.
"""

import argparse

from datasets import build_datasets
from lib.cli import declared, start
from lib.labels import pseudo_files, table


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("action", choices=("to-csv", "from-csv"), help="which of the two to make")
    parser.add_argument("source", metavar="IN", help="to-csv: a .pth.tar file; from-csv: a table")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="to-csv: folder of the images (DIR/train/<class>/* ...), whose paths fill the column path; "
        "without it that column is empty",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.action == "to-csv":
        pseudo, paths = pseudo_files.load(args.source), ()
        if args.data_dir:
            paths = build_datasets("folder", args.data_dir, in_memory=False)[0].paths
        table.to_csv(pseudo, args.target, paths=paths)
    else:
        pseudo = table.from_csv(args.source)
        pseudo_files.save(pseudo, args.target)
    print(
        f"{args.target}: {len(pseudo.indexes)} pseudo-labeled and {len(pseudo.labeled)} labeled images"
    )


if __name__ == "__main__":
    start.run(main, build_parser())
