"""Which images to label: the precision of phase 2 with the labels that each way of choosing asks for.

    python scripts/benchmarks/choosing.py --features checkpoint/NAME/ckpt.cifar.folder.features.pth.tar

Rows are ways to choose (scripts/choose.py), columns are numbers of labels; an entry is the mean over --seeds
seeds of the precision of the pseudo-labels of all other images, in percent, its standard deviation, and the
mean number of classes that have a label. The seed draws the random images, the sample that is covered, and
the starts of k-means. `spectral` are distances in the spectral embedding, the others those of the features.
Features come from a file, a checkpoint or a network from elsewhere, as in scripts/propagate.py; labels come
with them or from --dataset. --images takes a random part of them.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from datasets import UNKNOWN
from lib.cli import declared, embedding, start
from lib.cli.embedding import Embedding
from lib.files import provenance
from lib.propagation import EmbeddingGraph, Labeling
from lib.propagation.active_learning import METHODS, choose
from lib.propagation.algorithms import run_algorithm
from lib.propagation.normalized_cut import NUM_EIGENVECTORS
from lib.runtime import devices
from lib.runtime.option import NOT_NEGATIVE, POSITIVE, option
from lib.runtime.seeding import generator

COUNTS = [10, 20, 40, 50]
ALGORITHMS = ("nc", "knn")
WAYS = {  # row: (method, whether distances are those in the spectral embedding)
    **{name: (name, False) for name in METHODS},
    "maxherding spectral": ("maxherding", True),
    "typiclust spectral": ("typiclust", True),
}


@dataclass(frozen=True)
class Measurement(Embedding):
    GROUP: ClassVar[str] = "measurement"

    images: int = option(0, limit=NOT_NEGATIVE, help="take this many images; 0: all")
    seeds: int = option(5, limit=POSITIVE, help="seeds of each way, 0, 1, ...")
    output: str = option("", metavar="FILE", help="JSON file for the numbers")


def build_parser() -> declared.Parser:
    parser = declared.parser(__doc__, Measurement)
    parser.add_argument(
        "--num-labeled", type=declared.positive_int, nargs="+", default=COUNTS, help="label counts"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to choose"
    )
    return parser


def choices(
    way: str, graph: EmbeddingGraph, targets: Tensor, num_classes: int, counts: list[int], seed: int
) -> list[Tensor]:
    """Choose so many images by one way: anew for each number where a beginning is not a choice."""
    method, is_spectral = WAYS[way]
    points = graph.spectrum(NUM_EIGENVECTORS - 1).rows() if is_spectral else graph.features
    options = {"targets": targets, "num_classes": num_classes, "seed": seed}
    if method in ("typiclust", "stratified"):
        return [choose(method, points, count, **options) for count in counts]
    found = choose(method, points, max(counts), **options)
    return [found[:count] for count in counts]


def precision(scores: Tensor, targets: Tensor, labeled: Tensor) -> float:
    others = targets != UNKNOWN
    others[labeled] = False
    return 100 * float((scores.argmax(dim=1)[others] == targets[others]).double().mean())


def measure(
    way: str, graph: EmbeddingGraph, targets: Tensor, num_classes: int, args: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Measure precisions and numbers of classes by number of labels, and the seconds of all choices."""
    found: dict[str, dict[int, list[float]]] = {}
    for seed in range(args.seeds):
        begin = time.perf_counter()
        chosen = choices(way, graph, targets, num_classes, args.num_labeled, seed)
        found.setdefault("seconds", {}).setdefault(0, []).append(time.perf_counter() - begin)
        labelings = [Labeling(images, targets[images]) for images in chosen]
        for name in ALGORITHMS:
            answers = run_algorithm(graph, name, labelings, num_classes)
            for images, scores in zip(chosen, answers, strict=True):
                values = found.setdefault(name, {}).setdefault(len(images), [])
                values.append(precision(scores, targets, images))
        for images in chosen:
            classes = found.setdefault("classes", {}).setdefault(len(images), [])
            classes.append(len(targets[images].unique()))
    return found


def rows(way: str, found: dict) -> str:
    """Format the lines of one way in the table."""
    lines = []
    for name in ALGORITHMS:
        cells = [
            f"{statistics.mean(p):.1f} ± {statistics.stdev(p) if len(p) > 1 else 0:.1f} "
            f"({statistics.mean(found['classes'][count]):.1f})"
            for count, p in found[name].items()
        ]
        seconds = statistics.mean(found["seconds"][0])
        lines.append(f"| {way} | {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict:
    embedding.check_source(args, build_parser())
    device = devices.select("cpu")
    found = embedding.load(args, device)
    features, targets = found.features, found.targets
    if (targets == UNKNOWN).any():
        raise ValueError("every image needs a label, to choose as if it had none and to measure")
    if args.images:
        kept = torch.randperm(len(features), generator=generator(0, "sample"))[: args.images]
        features, targets = features[kept], targets[kept]
    graph = EmbeddingGraph(features)
    print(f"{len(targets)} images, {found.num_classes} classes; {device}; {args.seeds} seeds\n")
    print(f"| labels of | | {' | '.join(map(str, args.num_labeled))} | s |")
    print("|---" * (len(args.num_labeled) + 3) + "|")
    results = {}
    for way in args.ways:
        results[way] = measure(way, graph, targets, found.num_classes, args)
        print(rows(way, results[way]), flush=True)
    if args.output:
        record = {"ways": results, "meta": provenance.record(vars(args), found.digest)}
        Path(args.output).write_text(json.dumps(record, indent=1))
    return results


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    start.run(main, build_parser())
