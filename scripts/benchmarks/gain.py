"""What pseudo-labels gain a linear classifier, and whether cross-validation on the labels finds it out.

    python scripts/benchmarks/gain.py --features checkpoint/NAME/ckpt.cifar.folder.features.pth.tar

A row for each number of labels, means over --splits draws of the labeled images: the precision of the
pseudo-labels of the normalized cut, and the accuracy on all images without a label of the classifier that is
trained on the labels and on a share of the pseudo-labels. `alone` are the labels without any; `auto` is the
share that `--estimate-gain` finds best in each draw, looking at the labels only. Features come from a file, a
checkpoint or a network from elsewhere, as in scripts/propagate.py; labels come with them or from --dataset.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from datasets import UNKNOWN
from lib.cli import declared, embedding, start
from lib.cli.embedding import Embedding
from lib.files import provenance
from lib.labels.split import labeled_split
from lib.propagation import EmbeddingGraph, calibrate, estimate_gain, propagate
from lib.propagation.gain import RATIOS, classify
from lib.runtime import devices
from lib.runtime.option import POSITIVE, option

METHOD = "nc"
HEADS = ("precision", "alone", *(f"{ratio:.0%}" for ratio in RATIOS if ratio), "auto")


@dataclass(frozen=True)
class Measurement(Embedding):
    GROUP: ClassVar[str] = "measurement"

    num_neighbors: int = option(20, limit=POSITIVE, help="neighbors in the graph")
    splits: int = option(5, limit=POSITIVE, help="draws of the labeled images, seeds 0, 1, ...")
    output: str = option("", metavar="FILE", help="JSON file for the numbers")


def build_parser() -> declared.Parser:
    parser = declared.parser(__doc__, Measurement)
    counts = {"type": declared.positive_int, "nargs": "+", "default": [50, 250, 1000]}
    parser.add_argument("--num-labeled", **counts, help="label counts")
    return parser


def measure(
    graph: EmbeddingGraph, targets: Tensor, num_classes: int, count: int, seed: int
) -> list[float]:
    """Measure one draw: a percentage for each of `HEADS`."""
    split = labeled_split(targets, count, num_classes, seed)
    labels, truth = targets[split.labeled], targets[split.unlabeled]
    known = (graph, METHOD, split, labels, num_classes)
    calibration = calibrate(*known)
    gain = estimate_gain(*known, calibration=calibration, seed=seed)
    answer = propagate(*known)
    pseudo = answer.pseudo_labels(split, calibration=calibration, probabilities=False)
    found = classify(graph.features, pseudo, labels, split.unlabeled, num_classes, RATIOS)
    right = {ratio: 100 * float((x == truth).double().mean()) for ratio, x in found.items()}
    precision = 100 * float((pseudo.labels == targets[pseudo.indexes]).double().mean())
    return [precision, *right.values(), right[gain.ratio]]


def main(args: argparse.Namespace) -> dict[int, list[list[float]]]:
    embedding.check_source(args, build_parser())
    found = embedding.load(args, devices.select("cpu"))
    if (found.targets == UNKNOWN).any():
        raise ValueError("every image needs a label, to hide it and to measure")
    graph = EmbeddingGraph(found.features, num_neighbors=args.num_neighbors)
    print(f"{len(graph)} images, {found.num_classes} classes; {args.splits} draws\n")
    print(f"| labels | {' | '.join(HEADS)} |")
    print("|---:" * (1 + len(HEADS)) + "|")
    results = {}
    for count in args.num_labeled:
        draws = range(args.splits)
        of_draws = [measure(graph, found.targets, found.num_classes, count, s) for s in draws]
        results[count] = of_draws
        means = [statistics.fmean(column) for column in zip(*of_draws, strict=True)]
        print(f"| {count} | {' | '.join(f'{mean:.1f}' for mean in means)} |", flush=True)
    if args.output:
        record = {"results": results, "meta": provenance.record(vars(args), found.digest)}
        Path(args.output).write_text(json.dumps(record, indent=1))
    return results


if __name__ == "__main__":
    start.run(main, build_parser())
