"""Phase 2 from the shell: spread a few labels through a metric to every other image.

    python scripts/propagate.py --checkpoint checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --method nc --num-labeled 50 250 4000 --save-path checkpoint/pseudos/mine --report

Methods: `knn` and `nc`, the published ones; `filter`, `spreading`, `poisson`, `poisson-prior` on the same
graph without eigenvectors; `auto` chooses among all of them by cross-validation on the labelled images
alone; `ensemble` averages the best three. One file `<number of labels>.pth.tar` is written per count, for
`cifar-semi.py --pseudo-file`, and a table is printed where true labels are known.

From a feature file instead of a checkpoint: --features FILE. With --chunks 10 the unlabelled images are
shuffled and cut into ten parts, each with a graph of its own (the published ImageNet layout
`<number of labels>/10_0.pth.tar` ...). --report adds the confidence-precision curve, contact sheets of the
most and least confident images of each class, and `report.html` that shows them all.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import build_datasets
from lib import devices, features, options, plots, provenance, pseudo_labels, report
from lib.curves import Curve, confidence_precision
from lib.filters import FILTERS
from lib.graph import PRESETS, build_graph
from lib.propagation import METHODS, Metric, propagate
from lib.propagation.algorithms import ALGORITHMS
from lib.pseudo_labels import CONFIDENCES, PseudoLabels
from lib.spectral import SELF_LOOPS
from lib.split import Split, cut_into_chunks, labeled_split

# Parameters of single algorithms: given to the method only where the user sets them.
PARAMETERS = ("k", "knn_temperature", "num_eigenvectors", "clamp", "filter", "alpha")


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    options.add_data(parser, "--data_dir")
    network = options.add_model(parser)
    network.set_defaults(architecture="")
    network.add_argument("--checkpoint", default="", metavar="FILE", help="metric of phase 1")
    network.add_argument(
        "--features", default="", metavar="FILE", help="feature file, in place of --checkpoint"
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--num-labeled",
        type=options.num_labeled,
        nargs="+",
        default=[50, 100, 250, 500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="numbers of labelled images, equally many of each class; all: every known label",
    )
    labels.add_argument(
        "--chunks", type=int, default=1, help="parts of the unlabelled images, a graph each"
    )
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--method", choices=METHODS, default="nc", help="how labels spread")
    algorithm.add_argument("--graph", choices=PRESETS, default="cifar", help="affinity matrix")
    algorithm.add_argument(
        "--num-neighbors", type=int, default=None, metavar="K", help="in place of the graph's own"
    )
    algorithm.add_argument(
        "--graph-file", default="", metavar="FILE", help="keep the graph there and use it again"
    )
    algorithm.add_argument(
        "--self-loops", choices=SELF_LOOPS, default="published", help="edges to itself that count"
    )
    algorithm.add_argument("--k", type=int, default=None, help="knn: neighbours that vote (200)")
    algorithm.add_argument(
        "--knn-temperature", type=float, default=None, help="knn: of the votes (0.1)"
    )
    algorithm.add_argument(
        "--num-eigenvectors", type=int, default=None, help="nc: with the constant one (200)"
    )
    algorithm.add_argument(
        "--clamp", action="store_true", default=None, help="nc: labelled images keep their labels"
    )
    algorithm.add_argument(
        "--filter", choices=FILTERS, default=None, help="filter: its kind (smoothed-step)"
    )
    algorithm.add_argument("--alpha", type=float, default=None, help="spreading: share kept (0.99)")
    algorithm.add_argument(
        "--class-prior",
        choices=("none", "uniform"),
        default="none",
        help="uniform: as many predicted images in every class",
    )
    algorithm.add_argument(
        "--confidence",
        choices=CONFIDENCES,
        default=None,
        help="measure (default: the method's own)",
    )
    algorithm.add_argument("--temperature", type=float, default=1.0, help="of the probabilities")
    options.add_compute(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--save-path", default="./checkpoint/pseudos/propagated", help="folder")
    files.add_argument("--report", action="store_true", help="curve, contact sheets, report.html")
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.require_positive(args, "chunks", "temperature")
    if bool(args.features) == bool(args.checkpoint):
        raise ValueError("give --checkpoint FILE (of phase 1) or --features FILE, one of them")
    if args.graph_file and args.chunks > 1:
        raise ValueError("--graph-file keeps one graph; it does not go with --chunks")


def method_parameters(args: argparse.Namespace) -> dict:
    """What the user set for the method, under the names of its own arguments."""
    given = {name: getattr(args, name) for name in PARAMETERS if getattr(args, name) is not None}
    if "knn_temperature" in given:
        given["temperature"] = given.pop("knn_temperature")
    return given


def build_metric(args: argparse.Namespace, rows: Tensor) -> Metric:
    needs_graph = args.method not in ALGORITHMS or ALGORITHMS[args.method].needs_graph
    given = None
    if args.graph_file and needs_graph:
        given = build_graph(
            rows, args.graph, num_neighbors=args.num_neighbors, path=args.graph_file
        )
    return Metric(rows, args.graph, args.num_neighbors, args.self_loops, given)


def label(args: argparse.Namespace, metric: Metric, split: Split, targets: Tensor, found, meta):
    """Pseudo-labels of one split."""
    prior = [1 / found.num_classes] * found.num_classes if args.class_prior == "uniform" else None
    answer = propagate(
        metric,
        args.method,
        split,
        targets[split.labeled],
        found.num_classes,
        class_prior=prior,
        **method_parameters(args),
    )
    confidence = args.confidence or answer.confidence
    return pseudo_labels.from_scores(
        answer.scores,
        split,
        meta | {"propagation": answer.meta, "confidence": confidence},
        temperature=args.temperature,
        confidence=confidence,
    )


def in_chunks(args, found, split: Split, meta: dict) -> list[PseudoLabels]:
    """Each part of the unlabelled images on a graph of its own, with all labelled images."""
    parts = []
    for chunk in cut_into_chunks(split, args.chunks, args.rng_seed):
        members = torch.cat([split.labeled, chunk])
        metric = build_metric(args, found.features[members])
        local = Split(
            torch.arange(len(split.labeled)), torch.arange(len(split.labeled), len(members))
        )
        part = label(args, metric, local, found.targets[members], found, meta)
        parts.append(pseudo_labels.reindexed(part, members))
    return parts


def save_all(parts: list[PseudoLabels], folder: Path, name: str) -> str:
    """One file, or the published layout of chunks; returns what was written."""
    if len(parts) == 1:
        pseudo_labels.save(parts[0], folder / f"{name}.pth.tar")
        return f"{name}.pth.tar"
    for number, part in enumerate(parts):
        pseudo_labels.save(part, folder / name / f"{len(parts)}_{number}.pth.tar")
    return f"{name}/{len(parts)}_*.pth.tar"


def write_report(args, folder: Path, done: dict[str, PseudoLabels], curves, meta: dict) -> None:
    """The curve, contact sheets and report.html; sheets need the images themselves."""
    pictures, sheets = {}, {}
    if curves:
        plots.confidence_precision(curves, args.method).savefig(folder / "curve.png", dpi=120)
        pictures["curve.png"] = "Precision of the most confident share"
    try:
        data, _ = build_datasets(
            args.dataset,
            args.data_dir,
            image_size=args.image_size,
            num_workers=args.num_workers,
        )
    except ValueError as error:
        print(f"warning: no contact sheets without the images: {error}", file=sys.stderr)
        data = None
    for name, pseudo in tqdm(done.items(), desc="contact sheets", leave=False, disable=None):
        if data is not None and len(data) == len(pseudo.labeled) + len(pseudo.unlabeled):
            written = report.write_sheets(pseudo, data, folder / f"sheets_{name}")
            sheets[name] = [(c, f"sheets_{name}/{file}", n) for c, file, n in written]
    facts = {"method": args.method, "graph": args.graph, "git commit": meta["git_commit"]}
    facts |= {"data digest": meta["data_digest"], "seed of the split": args.rng_seed}
    report.write_page(
        folder / "report.html",
        title="Pseudo-labels",
        facts=facts,
        curves=curves,
        pictures=pictures,
        sheets=sheets,
    )
    print(f"report: {folder / 'report.html'}")


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    # 1. Features: read, or extracted once and kept beside the checkpoint
    check_options(args)
    compute = devices.select(args.gpus, args.precision)
    found = features.obtain(
        features=args.features,
        checkpoint_file=args.checkpoint,
        architecture=args.architecture,
        dataset=args.dataset,
        data_dir=args.data_dir,
        image_size=args.image_size,
        num_workers=args.num_workers,
        compute=compute,
    )
    folder = options.writable_folder("--save-path", args.save_path)
    meta = provenance.record(vars(args), found.digest)
    print(
        f"{len(found.features)} x {found.features.shape[1]} features, {found.num_classes} classes"
    )

    # 2. Propagation; the graph and its spectrum serve every number of labels
    metric = build_metric(args, found.features)
    results: dict[str, dict[str, float]] = {}
    curves: dict[int, Curve] = {}
    done: dict[str, PseudoLabels] = {}
    print("labels  precision     AUC  seconds  file")
    for n in args.num_labeled:
        start = time.perf_counter()
        split = labeled_split(found.targets, n, found.num_classes, args.rng_seed)
        if args.chunks > 1:
            parts = in_chunks(args, found, split, meta)
        else:
            parts = [label(args, metric, split, found.targets, found, meta)]
        written = save_all(parts, folder, str(n))
        pseudo = done[str(n)] = pseudo_labels.merged(parts)
        curve = confidence_precision(pseudo, found.targets)
        seconds, count = time.perf_counter() - start, len(split.labeled)
        shown = "       ?%      ?%"
        results[str(n)] = {"seconds": seconds}
        if curve is not None:
            curves[count] = curve
            results[str(n)] |= {"precision": curve.overall, "auc": curve.auc}
            shown = f"{curve.overall:8.2f}%  {curve.auc:5.2f}%"
        chosen = ", ".join(pseudo.meta["propagation"].get("chosen", ()))
        line = f"{count:6d}  {shown}  {seconds:7.1f}  {folder / written}"
        print(line + (f"  {args.method}: {chosen}" if chosen else ""), flush=True)

    # 3. What they look like
    (folder / "results.json").write_text(json.dumps({"results": results, "meta": meta}, indent=1))
    if args.report:
        write_report(args, folder, done, curves, meta)
    return results


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    options.run(main, build_parser())
