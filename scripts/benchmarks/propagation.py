"""Compare phase 2 with a literal rendering of the published steps, in the same run.

    python scripts/benchmarks/propagation.py --features DIR/ckpt.cifar.folder.features.pth.tar

Every variant runs in its own process, so that its peak memory can be measured, on the same features and
the same labeled images. Without --features these are a synthetic mixture of --images points. The script
prints seconds, peak memory, the precision of the pseudo-labels at each number of labels, and the share of
images on which a variant agrees with the literal one, and writes the same to --output. With several --images
it shows how time and memory grow, as exponents of N and, with --picture, as a picture.

The literal steps (4 N^2 bytes) cannot reach the size of ImageNet. One graph, 200 eigenvectors:

    python scripts/benchmarks/propagation.py --images 1280000 --classes 1000 --num-neighbors 51 \\
        --num-labeled 13000 51000 --variants nc
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import eigsh
from torch import Tensor

from lib.cli import declared, start
from lib.features import extraction
from lib.files import provenance
from lib.graph.affinity import affinity_matrix, chosen_preset
from lib.graph.neighbors import METHODS as SEARCHES
from lib.graph.neighbors import PRECISIONS, nearest_neighbors
from lib.labels.split import Split, labeled_split, others
from lib.propagation import EmbeddingGraph, Labeling, propagate
from lib.propagation.algorithms import ALGORITHMS, run_algorithm
from lib.propagation.normalized_cut import NUM_EIGENVECTORS
from lib.report import plots
from lib.runtime import devices, profiling
from lib.runtime.seeding import generator
from models.layers import l2_normalize

COUNTS = [50, 100, 250, 500, 1000, 2000, 4000, 8000]  # published
CLUSTERS, NOISE = 5, 1.4  # per class of the mixture; of its points around a cluster
# seconds by step, predicted class of every image by number of labels, recall of the neighbors
Answer = tuple[dict[str, float], dict[int, Tensor], float]


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--features", default="", metavar="FILE", help="feature file with labels")
    parser.add_argument(
        "--images",
        type=declared.positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes: of the synthetic mixture (default 50000), or of random parts of the features (all)",
    )
    parser.add_argument(
        "--classes", type=declared.positive_int, default=10, help="classes of the synthetic mixture"
    )
    parser.add_argument(
        "--num-labeled", type=declared.positive_int, nargs="+", default=COUNTS, help="label counts"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=DEFAULT, help="what to run"
    )
    parser.add_argument(
        "--num-neighbors",
        type=declared.positive_int,
        default=20,
        help="of the graph (published: 20)",
    )
    parser.add_argument(
        "--search", choices=SEARCHES, default="auto", help="of the neighbors; ivf is approximate"
    )
    parser.add_argument(
        "--search-precision", choices=PRECISIONS, default="auto", help="of its products"
    )
    parser.add_argument(
        "--gpus", default="cpu", metavar="DEVICE", help="0: our variants on that CUDA device; cpu"
    )
    parser.add_argument("--rng-seed", type=declared.seed, default=0, help="seed of the split")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    parser.add_argument(
        "--picture", default="", metavar="FILE", help="PNG of the growth over several --images"
    )
    return parser


def mixture(
    num_images: int, num_classes: int, dim: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw unit vectors of overlapping classes of five clusters each; return them and their classes.

    All directions are drawn with variances that fall as exp(-k / 15), which gives the cloud about the
    spread of a trained metric: on CIFAR-10 features of phase 1 the participation ratio of the covariance
    is 20, here 31 with a thousand classes. There, half of all nearest neighbors are of another class at
    N = 320,000, as published for ImageNet (nearest-neighbor accuracy 47%).
    """
    rng = generator(seed, "sample")
    scale = torch.exp(-torch.arange(dim) / 30)
    scale /= scale.norm()
    centers = torch.randn(num_classes, dim, generator=rng).repeat_interleave(CLUSTERS, 0)
    centers = scale * (centers + 0.6 * torch.randn(len(centers), dim, generator=rng))
    cluster = torch.randint(len(centers), (num_images,), generator=rng)
    rows = torch.empty(num_images, dim)
    for part, of in zip(rows.split(65536), cluster.split(65536), strict=True):
        noise = torch.randn(part.shape, generator=rng)
        part[:] = l2_normalize(centers[of] + NOISE * scale * noise)
    return rows, cluster // CLUSTERS


def literal(rows, splits, num_classes, num_neighbors, search) -> Answer:
    """Run the normalized cut step by step as published: a dense N x N matrix, smallest eigenvalues."""
    seconds, start = {}, time.perf_counter()
    n = len(rows)
    similarities = rows @ rows.T
    top, places = similarities.topk(num_neighbors, dim=1)
    del similarities
    distances = (1 - top.double().numpy()) / 2
    pairs = (np.repeat(np.arange(n), num_neighbors), places.numpy().ravel())
    w = sp.csr_matrix((np.exp(-2 * distances / 0.2).ravel(), pairs), (n, n))
    w = (w + w.T) / 2
    seconds["graph"] = time.perf_counter() - start
    start = time.perf_counter()
    values, vectors = eigsh(laplacian(w, normed=True), k=200, which="SM", tol=1e-2)
    order = np.argsort(values)
    values, vectors = values[order][1:], vectors[:, order][:, 1:]
    seconds["spectrum"] = time.perf_counter() - start
    start, answers = time.perf_counter(), {}
    degree = np.asarray(w.sum(axis=1)).ravel()
    for count, (labeled, labels) in splits.items():
        z = np.zeros((n, num_classes))
        for c in range(num_classes):
            u = np.zeros(n)
            u[labeled] = np.where(labels == c, 1.0, -1.0)
            p, q = degree * (abs(u) + u) / 2, degree * (abs(u) - u) / 2
            r = p.sum() / q.sum()
            s = np.sqrt(p / r) - np.sqrt(q * r)
            z[:, c] = vectors @ ((vectors.T @ (s / np.linalg.norm(s))) / values)
        z *= np.sqrt(n) / np.linalg.norm(z, axis=0)
        answers[count] = torch.from_numpy(z.argmax(axis=1))
    seconds["labels"] = time.perf_counter() - start
    return seconds, answers, 1.0


def own(method: str, **parameters: float) -> Callable[..., Answer]:
    """Return a variant that runs an algorithm of lib/, its graph and spectrum made anew."""

    def run(rows, splits, num_classes, num_neighbors, search):
        seconds, start = {}, time.perf_counter()
        graph, recall = EmbeddingGraph(rows), 1.0
        algorithm = ALGORITHMS.get(method)
        if algorithm is None or algorithm.needs_graph:
            preset = chosen_preset("cifar", num_neighbors)
            found = nearest_neighbors(rows, num_neighbors, include_self=True, **search)
            graph, recall = EmbeddingGraph(rows, given=affinity_matrix(found, preset)), found.recall
            del found
            seconds["graph"] = time.perf_counter() - start
            start = time.perf_counter()
        if method == "nc":
            graph.spectrum(parameters.get("num_eigenvectors", NUM_EIGENVECTORS) - 1)
            seconds["spectrum"] = time.perf_counter() - start
            start = time.perf_counter()
        answers = {}
        if algorithm:
            sets = {n: Labeling(*split) for n, split in splits.items()}
            # Algorithms that need products share them; the others need not hold all scores at a time.
            groups = [[n] for n in sets] if method in ("nc", "knn") else [list(sets)]
            for group in groups:
                labelings = [sets[n] for n in group]
                scores = run_algorithm(graph, method, labelings, num_classes, **parameters)
                answers |= {
                    n: one.argmax(dim=1).cpu() for n, one in zip(group, scores, strict=True)
                }
                del scores
        else:
            for n, (labeled, labels) in splits.items():
                split = Split(labeled, others(len(rows), labeled))
                answers[n] = (
                    propagate(graph, method, split, labels, num_classes).scores.argmax(1).cpu()
                )
        seconds["labels"] = time.perf_counter() - start
        return seconds, answers, recall

    return run


def scikit_learn(rows, splits, num_classes, num_neighbors, search) -> Answer:
    """Run LabelSpreading of scikit-learn with its kernel of nearest neighbors, once per number of labels."""
    from sklearn.semi_supervised import LabelSpreading

    start, answers = time.perf_counter(), {}
    for count, (labeled, labels) in splits.items():
        known = torch.full((len(rows),), -1)
        known[labeled] = labels
        model = LabelSpreading(kernel="knn", n_neighbors=num_neighbors, n_jobs=-1)
        answers[count] = torch.from_numpy(model.fit(rows.numpy(), known.numpy()).transduction_)
    return {"labels": time.perf_counter() - start}, answers, 1.0


VARIANTS: dict[str, Callable[..., Answer]] = {
    "literal": literal,
    "nc": own("nc"),
    "filter": own("filter"),
    "knn": own("knn"),
    "auto": own("auto"),
    "poisson": own("poisson"),
    "spreading": own("spreading", alpha=0.99),
    "spreading-0.9": own("spreading", alpha=0.9),
    "scikit-learn": scikit_learn,
}
DEFAULT = ["literal", "nc", "filter", "knn"]
NOT_OURS = ("literal", "scikit-learn")


def _forget_peak() -> None:
    """Reset the peak memory of this process where Linux allows it: a child inherits that of its parent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """Return the largest resident memory of this process."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def _measured(connection, name: str, device: torch.device, rows: Tensor, *problem: object) -> None:
    """Run one variant in this process and send its seconds, answers and memory."""
    warnings.simplefilter("ignore", UserWarning)  # components are reported once, by the parent
    _forget_peak()
    before = _peak_mib()
    rows = rows if name in NOT_OURS else rows.to(device)
    seconds, answers, recall = VARIANTS[name](rows, *problem)
    answers = {count: classes.cpu().numpy() for count, classes in answers.items()}
    connection.send((seconds, answers, recall, before, _peak_mib()))
    connection.close()


def run_variant(name: str, *problem: object) -> dict:
    """Measure seconds by step and memory in MiB (of the process, and above its start); get the answers."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(sender, name, *problem))
    child.start()
    sender.close()
    try:
        seconds, answers, recall, before, peak = receiver.recv()
    except EOFError:
        child.join()
        raise ValueError(f"{name} ended with exit code {child.exitcode}; out of memory?") from None
    child.join()
    answers = {count: torch.from_numpy(a) for count, a in answers.items()}
    memory = {"peak_mib": peak, "added_mib": max(1.0, peak - before)}
    memory["recall"] = recall
    return {"seconds": seconds, "total_s": sum(seconds.values()), **memory, "answers": answers}


def precision(answers: Tensor, targets: Tensor, unlabeled: Tensor) -> float:
    return 100 * (answers[unlabeled] == targets[unlabeled]).double().mean().item()


def problems(args: argparse.Namespace) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Load or draw features and targets of every size; also return the number of classes."""
    if not args.features:
        sizes = args.images or [50000]
        return [mixture(n, args.classes) for n in sizes], args.classes
    rows, targets, meta = extraction.read(args.features)
    if targets is None:
        raise ValueError(f"{args.features} holds no labels to measure precision with")
    order = torch.randperm(len(rows), generator=generator(0, "sample"))
    wrong = [n for n in args.images if n > len(rows)]
    if wrong:
        raise ValueError(f"--images {wrong[0]}: {args.features} holds only {len(rows)}")
    parts = [order[:n].sort().values for n in args.images or [len(rows)]]
    num_classes = meta.get("num_classes", int(targets.max()) + 1)
    return [(rows[part], targets[part]) for part in parts], num_classes


def fits(name: str, num_images: int) -> bool:
    """Tell whether a variant is installed and its matrix fits the memory; print why not."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if name == "scikit-learn" and importlib.util.find_spec("sklearn") is None:
        print("scikit-learn  is not installed: pip install scikit-learn")
        return False
    if name == "literal" and 4 * num_images**2 > available:
        print(f"literal   needs {4 * num_images**2 / 2**30:.0f} GiB for its matrix: left out")
        return False
    return True


def measure(args: argparse.Namespace, rows: Tensor, targets: Tensor, num_classes: int) -> dict:
    """Measure every variant on one set of features, and print a table."""
    drawn = {n: labeled_split(targets, n, num_classes, args.rng_seed) for n in args.num_labeled}
    splits = {n: (s.labeled, targets[s.labeled]) for n, s in drawn.items()}
    search = {"method": args.search, "precision": args.search_precision}
    counts = " ".join(f"{n:>6d}" for n in args.num_labeled)
    print("variant        seconds (by step)" + " " * 37 + f"peak MiB  precision at {counts}")
    found, literal_answers = {}, None
    for name in args.variants:
        if not fits(name, len(rows)):
            continue
        device = devices.select(args.gpus).torch_device
        run = run_variant(name, device, rows, splits, num_classes, args.num_neighbors, search)
        answers = run.pop("answers")
        literal_answers = answers if name == "literal" else literal_answers
        run["precision"] = {
            n: precision(a, targets, drawn[n].unlabeled) for n, a in answers.items()
        }
        if literal_answers is not None:
            run["agreement"] = {
                n: precision(a, literal_answers[n], drawn[n].unlabeled) for n, a in answers.items()
            }
        found[name] = run
        steps = ", ".join(f"{step} {s:.1f}" for step, s in run["seconds"].items())
        steps += f"; recall {run['recall']:.3f}" if run["recall"] < 1 else ""
        print(
            f"{name:13s}  {run['total_s']:7.1f} ({steps})".ljust(69)
            + f"{run['peak_mib']:9.0f}               "
            + " ".join(f"{p:6.2f}" for p in run["precision"].values()),
            flush=True,
        )
    for name, run in found.items():
        if "agreement" in run and name != "literal":
            shares = " ".join(f"{p:6.2f}" for p in run["agreement"].values())
            print(f"{name:13s}  agrees with literal on".ljust(69) + " " * 24 + shares)
    return found


def compare(found: dict, rows: Tensor, gpus: str) -> dict[str, float]:
    """Print ratios to the literal steps, and the floor of an exact graph in float32 on this machine."""
    rate = profiling.matrix_rate(devices.select(gpus, "fp32"))
    floor = 2 * len(rows) ** 2 * rows.shape[1] / rate
    print(f"floor of an exact graph: 2 N^2 D at {rate / 1e9:.0f} GFLOP/s = {floor:.1f} s")
    literal_run = found.get("literal")
    for name in found if literal_run else ():
        if name != "literal":
            speed = literal_run["total_s"] / found[name]["total_s"]
            memory = literal_run["added_mib"] / found[name]["added_mib"]
            print(
                f"{name}: {speed:.1f} times as fast as literal, {memory:.1f} times less added memory"
            )
    return {"matrix_rate": rate, "floor_s": floor}


def growth(runs: dict[int, dict]) -> dict[str, dict[str, float]]:
    """Fit the exponents of N that time and memory grow with, by least squares on logarithms, by variant."""
    exponents: dict[str, dict[str, float]] = {}
    names = [name for name in VARIANTS if sum(name in found for found in runs.values()) > 1]
    for name in names:
        sizes = [n for n in runs if name in runs[n]]
        exponents[name] = {
            key: float(np.polyfit(np.log(sizes), np.log([runs[n][name][key] for n in sizes]), 1)[0])
            for key in ("total_s", "added_mib")
        }
        time_exponent, memory_exponent = exponents[name].values()
        print(f"{name}: time grows as N^{time_exponent:.2f}, memory as N^{memory_exponent:.2f}")
    return exponents


def main(args: argparse.Namespace) -> dict:
    sets, num_classes = problems(args)
    runs, floors = {}, {}
    for rows, targets in sets:
        print(
            f"{len(rows)} x {rows.shape[1]} features, {num_classes} classes; {devices.select(args.gpus)}"
        )
        runs[len(rows)] = measure(args, rows, targets, num_classes)
        floors[len(rows)] = compare(runs[len(rows)], rows, args.gpus)
    record = {"variants": runs[len(sets[-1][0])], "sizes": runs, "floors": floors}
    record |= {"growth": growth(runs), "meta": provenance.record(vars(args))}
    if args.picture:
        plots.growth(runs).savefig(args.picture, dpi=120)
    if args.output:
        Path(args.output).write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    start.run(main, build_parser())
