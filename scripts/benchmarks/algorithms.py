"""Every propagation algorithm on the same features, labeled images and graph: a table of precisions.

    python scripts/benchmarks/algorithms.py --features checkpoint/NAME/ckpt.cifar.folder.features.pth.tar

Rows are algorithms, columns are numbers of labels; an entry is the mean over --splits draws of the labeled
images of the precision of the pseudo-labels of all other images, in percent, and its standard deviation.
The graph and its spectrum are made once, before the clock starts; seconds are those of one draw at one
number of labels, where all draws of a row share their products. `auto` and `ensemble` see the labeled images
only. scikit-learn's LabelSpreading (a row of its own) is measured where scikit-learn is installed.
--images takes a random part of the features, so that minutes become seconds.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from lib.cli import declared, start
from lib.features import extraction
from lib.files import provenance
from lib.graph.laplacian import SELF_LOOPS
from lib.labels.split import Split, labeled_split
from lib.propagation import EmbeddingGraph, Labeling, propagate
from lib.propagation.algorithms import ALGORITHMS, run_algorithm
from lib.runtime import devices
from lib.runtime.seeding import generator

COUNTS = [10, 20, 50, 100, 250, 1000, 4000]
METHODS = {  # row: (method, parameters)
    "knn": ("knn", {}),
    "knn-10": ("knn", {"k": 10}),
    "nc": ("nc", {}),
    "nc-50": ("nc", {"num_eigenvectors": 50}),
    "nc-500": ("nc", {"num_eigenvectors": 500}),
    "nc-clamp": ("nc", {"clamp": True}),
    "nc-500-clamp": ("nc", {"num_eigenvectors": 500, "clamp": True}),
    "pseudo-inverse": ("filter", {"filter": "pseudo-inverse"}),
    "powers": ("filter", {"filter": "powers"}),
    "smoothed-step": ("filter", {"filter": "smoothed-step"}),
    "heat": ("filter", {"filter": "heat"}),
    "heat-10": ("filter", {"filter": "heat", "time": 10.0}),
    "heat-5": ("filter", {"filter": "heat", "time": 5.0}),
    "smoothed-step-0.4": ("filter", {"filter": "smoothed-step", "cutoff": 0.4}),
    "ppr": ("filter", {"filter": "ppr"}),
    "ppr-0.9": ("filter", {"filter": "ppr", "alpha": 0.9}),
    "spreading": ("spreading", {}),
    "spreading-0.9": ("spreading", {"alpha": 0.9}),
    "spreading-prior": ("spreading", {"class_prior": "uniform"}),
    "poisson": ("poisson", {}),
    "poisson-prior": ("poisson-prior", {}),
    "auto": ("auto", {}),
    "ensemble": ("ensemble", {}),
    "scikit-learn": ("", {}),
}
Draw = tuple[int, Split]  # number of labels, which ones


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--features", required=True, metavar="FILE", help="features with labels")
    parser.add_argument(
        "--images", type=declared.not_negative_int, default=0, help="take this many of them; 0: all"
    )
    parser.add_argument(
        "--num-labeled", type=declared.positive_int, nargs="+", default=COUNTS, help="label counts"
    )
    parser.add_argument(
        "--splits", type=declared.positive_int, default=5, help="draws of each, seeds 0, 1, ..."
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--self-loops", choices=SELF_LOOPS, default="published", help="self-loops of the graph"
    )
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    return parser


def scikit_learn(rows: Tensor, labeled: Tensor, labels: Tensor) -> Tensor:
    """Predict classes by LabelSpreading with its own graph of 20 neighbors."""
    from sklearn.semi_supervised import LabelSpreading

    known = torch.full((len(rows),), -1)
    known[labeled] = labels
    model = LabelSpreading(kernel="knn", n_neighbors=20, n_jobs=-1)
    return torch.from_numpy(model.fit(rows.numpy(), known.numpy()).transduction_)


def answers(
    name: str, graph: EmbeddingGraph, draws: list[Draw], targets: Tensor, num_classes: int
) -> tuple[list[Tensor], list[str]]:
    """Predict the classes for every draw; also return what `auto` and `ensemble` chose."""
    method, parameters = METHODS[name]
    if parameters.get("class_prior") == "uniform":
        parameters = parameters | {"class_prior": [1 / num_classes] * num_classes}
    labelings = [Labeling(split.labeled, targets[split.labeled]) for _, split in draws]
    if method in ALGORITHMS:
        found = run_algorithm(graph, method, labelings, num_classes, **parameters)
        return [logits.argmax(dim=1) for logits in found], []
    if not method:
        return [scikit_learn(graph.features, *one) for one in labelings], []
    found = [
        propagate(graph, method, split, labels, num_classes)
        for (_, split), (_, labels) in zip(draws, labelings, strict=True)
    ]
    chosen = [" + ".join(one.meta["chosen"]) for one in found]
    return [one.scores.argmax(dim=1) for one in found], chosen


def measure(
    name: str, graph: EmbeddingGraph, draws: list[Draw], targets: Tensor, num_classes: int
) -> dict[str, object]:
    """Measure precisions in percent by number of labels, seconds per draw, and choices."""
    start = time.perf_counter()
    predicted, chosen = answers(name, graph, draws, targets, num_classes)
    seconds = (time.perf_counter() - start) / len(draws)
    precision: dict[int, list[float]] = {}
    choices: dict[int, list[str]] = {}
    for place, ((count, split), classes) in enumerate(zip(draws, predicted, strict=True)):
        right = classes[split.unlabeled] == targets[split.unlabeled]
        precision.setdefault(count, []).append(100 * right.double().mean().item())
        if chosen:
            choices.setdefault(count, []).append(chosen[place])
    return {"precision": precision, "seconds": seconds, "chosen": choices}


def table_row(name: str, found: dict) -> str:
    cells = [
        f"{statistics.mean(p):.1f} ± {statistics.stdev(p) if len(p) > 1 else 0:.1f}"
        for p in found["precision"].values()
    ]
    return f"| {name} | {' | '.join(cells)} | {found['seconds']:.2f} |"


def prepare(args: argparse.Namespace) -> tuple[EmbeddingGraph, Tensor, int, dict[str, float]]:
    """Make features with their graph and spectrum; return targets, classes and the seconds of each step."""
    rows, targets, meta = extraction.read(args.features)
    if targets is None:
        raise ValueError(f"{args.features} holds no labels to measure precision with")
    if args.images:
        kept = torch.randperm(len(rows), generator=generator(0, "sample"))[: args.images]
        rows, targets = rows[kept], targets[kept]
    graph, seconds = EmbeddingGraph(rows, self_loops=args.self_loops), {}
    for step, build in (
        ("graph", lambda: graph.affinity),
        ("operator", lambda: graph.operator),
        ("spectrum", lambda: graph.spectrum(499)),
    ):
        start = time.perf_counter()
        build()
        seconds[step] = time.perf_counter() - start
    return graph, targets, meta.get("num_classes", int(targets.max()) + 1), seconds


def main(args: argparse.Namespace) -> dict:
    device = devices.select("cpu")
    graph, targets, num_classes, seconds = prepare(args)
    draws = [
        (count, labeled_split(targets, count, num_classes, seed))
        for count in args.num_labeled
        for seed in range(args.splits)
    ]
    steps = ", ".join(f"{step} {s:.1f} s" for step, s in seconds.items())
    print(f"{len(targets)} images, {num_classes} classes; {device}; {steps}\n")
    print(f"| method | {' | '.join(map(str, args.num_labeled))} | s |")
    print("|---" * (len(args.num_labeled) + 2) + "|")
    found = {}
    for name in args.methods:
        if name == "scikit-learn" and not importlib.util.find_spec("sklearn"):
            print("scikit-learn is not installed: its row is left out", file=sys.stderr)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns that it has not converged
            found[name] = measure(name, graph, draws, targets, num_classes)
        print(table_row(name, found[name]), flush=True)
    for name in found:
        for count, chosen in found[name]["chosen"].items():
            print(f"{name} at {count}: {dict(Counter(chosen))}")
    if args.output:
        record = {"methods": found, "seconds": seconds, "meta": provenance.record(vars(args))}
        Path(args.output).write_text(json.dumps(record, indent=1))
    return found


if __name__ == "__main__":
    start.run(main, build_parser())
