"""Phase 2 against a literal rendering of the published steps, in the same run.

    python scripts/benchmark_propagation.py --features DIR/ckpt.cifar.folder.features.pth.tar

Every variant runs in a process of its own, so that its peak memory is its own, on the same features and
the same labelled images. Without --features: a synthetic mixture of --images points. Prints seconds, peak
memory and the precision of the pseudo-labels at each number of labels; writes the same to --output.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import eigsh
from torch import Tensor

from lib import devices, features, graph, options, provenance, spectral
from lib.propagation import Metric, propagate_knn, propagate_normalized_cut
from lib.propagation.algorithms import run_algorithm
from lib.propagation.checks import Labeling
from lib.seeding import generator
from lib.split import labeled_split
from models.layers import l2_normalize

COUNTS = [50, 100, 250, 500, 1000, 2000, 4000, 8000]  # published
Answer = tuple[
    dict[str, float], dict[int, Tensor]
]  # seconds by step, predicted class of every image


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    parser.add_argument("--features", default="", metavar="FILE", help="feature file with labels")
    parser.add_argument("--images", type=int, default=50000, help="size of the synthetic mixture")
    parser.add_argument("--classes", type=int, default=10, help="classes of the synthetic mixture")
    parser.add_argument("--num-labeled", type=int, nargs="+", default=COUNTS, help="label counts")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rng-seed", type=int, default=0, help="seed of the split")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    return parser


def mixture(num_images: int, num_classes: int, dim: int = 128, seed: int = 0) -> tuple:
    """Unit vectors of overlapping classes, each of a few clusters; and their classes."""
    rng = generator(seed, "sample")
    modes = 5 * num_classes
    centres = l2_normalize(torch.randn(modes, dim, generator=rng))
    mode = torch.randint(modes, (num_images,), generator=rng)
    # noise within a low-dimensional subspace, as the spectrum of a trained metric has it
    directions = torch.linspace(1, 0, dim) ** 2
    noise = torch.randn(num_images, dim, generator=rng) * directions
    return l2_normalize(centres[mode] + 0.42 * noise), mode % num_classes


def literal(rows: Tensor, splits: dict[int, tuple[Tensor, Tensor]], num_classes: int) -> Answer:
    """The normalised cut step by step as published: a dense N x N matrix, smallest eigenvalues."""
    seconds, start = {}, time.perf_counter()
    n = len(rows)
    similarities = rows @ rows.T
    top, places = similarities.topk(20, dim=1)
    del similarities
    distances = (1 - top.double().numpy()) / 2
    pairs = (np.repeat(np.arange(n), 20), places.numpy().ravel())
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
    return seconds, answers


def nc(rows: Tensor, splits: dict[int, tuple[Tensor, Tensor]], num_classes: int) -> Answer:
    """The normalised cut of lib/."""
    seconds, start = {}, time.perf_counter()
    affinity = graph.build_graph(rows, "cifar")
    seconds["graph"] = time.perf_counter() - start
    start = time.perf_counter()
    spectrum = spectral.laplacian_spectrum(affinity, 199)
    seconds["spectrum"] = time.perf_counter() - start
    start = time.perf_counter()
    answers = {
        count: propagate_normalized_cut(spectrum, *split, num_classes).argmax(dim=1)
        for count, split in splits.items()
    }
    seconds["labels"] = time.perf_counter() - start
    return seconds, answers


def graph_filter(
    rows: Tensor, splits: dict[int, tuple[Tensor, Tensor]], num_classes: int
) -> Answer:
    """The same seeds through a smoothed step and conjugate gradients: no eigenvectors."""
    seconds, start = {}, time.perf_counter()
    metric = Metric(rows, given=graph.build_graph(rows, "cifar"))
    seconds["graph"] = time.perf_counter() - start
    start = time.perf_counter()
    labelings = [Labeling(*split) for split in splits.values()]
    scores = run_algorithm(metric, "filter", labelings, num_classes)
    answers = {n: one.argmax(dim=1) for n, one in zip(splits, scores, strict=True)}
    seconds["labels"] = time.perf_counter() - start
    return seconds, answers


def knn(rows: Tensor, splits: dict[int, tuple[Tensor, Tensor]], num_classes: int) -> Answer:
    """Weighted nearest neighbours of lib/."""
    start = time.perf_counter()
    answers = {
        count: propagate_knn(rows, *split, num_classes).argmax(dim=1)
        for count, split in splits.items()
    }
    return {"labels": time.perf_counter() - start}, answers


VARIANTS: dict[str, Callable[..., Answer]] = {
    "literal": literal,
    "nc": nc,
    "filter": graph_filter,
    "knn": knn,
}


def _measured(connection, name: str, rows: Tensor, splits: dict, num_classes: int) -> None:
    """Run one variant in this process and send its seconds, answers and memory."""
    warnings.simplefilter("ignore", UserWarning)  # components are reported once, by the parent
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, answers = VARIANTS[name](rows, splits, num_classes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send((seconds, {k: v.numpy() for k, v in answers.items()}, before, peak))
    connection.close()


def run_variant(name: str, rows: Tensor, splits: dict, num_classes: int) -> dict:
    """Seconds by step, memory in MiB (of the whole process, and above its start), answers."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(sender, name, rows, splits, num_classes))
    child.start()
    sender.close()
    try:
        seconds, answers, before, peak = receiver.recv()
    except EOFError:
        child.join()
        raise ValueError(f"{name} ended with exit code {child.exitcode}; out of memory?") from None
    child.join()
    answers = {count: torch.from_numpy(a) for count, a in answers.items()}
    # Linux counts KiB, macOS bytes
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = {"peak_mib": peak / unit, "added_mib": (peak - before) / unit}
    return {"seconds": seconds, "total_s": sum(seconds.values()), **memory, "answers": answers}


def matrix_rate(side: int = 4096, repeats: int = 5) -> float:
    """Best float32 matrix product of several, in operations per second, on all threads."""
    left, right = torch.rand(side, side), torch.rand(side, side)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def precision(answers: Tensor, targets: Tensor, unlabeled: Tensor) -> float:
    return 100 * (answers[unlabeled] == targets[unlabeled]).double().mean().item()


def main(args: argparse.Namespace) -> dict:
    if args.features:
        rows, targets, meta = features.read(args.features)
        if targets is None:
            raise ValueError(f"{args.features} holds no labels to measure precision with")
        num_classes = meta.get("num_classes", int(targets.max()) + 1)
    else:
        rows, targets = mixture(args.images, args.classes)
        num_classes = args.classes
    compute = devices.select("cpu")
    print(f"{len(rows)} x {rows.shape[1]} features, {num_classes} classes; {compute}")
    drawn = {n: labeled_split(targets, n, num_classes, args.rng_seed) for n in args.num_labeled}
    splits = {n: (s.labeled, targets[s.labeled]) for n, s in drawn.items()}
    found = {}
    print(
        "variant   seconds (by step)" + " " * 40 + "peak MiB  precision at " + str(args.num_labeled)
    )
    for name in args.variants:
        run = found[name] = run_variant(name, rows, splits, num_classes)
        run["precision"] = {
            n: precision(a, targets, drawn[n].unlabeled) for n, a in run.pop("answers").items()
        }
        steps = ", ".join(f"{step} {s:.1f}" for step, s in run["seconds"].items())
        shown = "  ".join(f"{p:5.2f}" for p in run["precision"].values())
        print(
            f"{name:8s}  {run['total_s']:7.1f} ({steps})".ljust(66)
            + f"{run['peak_mib']:9.0f}  {shown}"
        )
    rate = matrix_rate()
    floor = 2 * len(rows) ** 2 * rows.shape[1] / rate
    print(f"floor of an exact graph: 2 N^2 D at {rate / 1e9:.0f} GFLOP/s = {floor:.1f} s")
    if "literal" in found:
        for name in [name for name in found if name != "literal"]:
            speed = found["literal"]["total_s"] / found[name]["total_s"]
            memory = found["literal"]["added_mib"] / found[name]["added_mib"]
            print(
                f"{name}: {speed:.1f} times as fast as literal, {memory:.1f} times less added memory"
            )
    if args.output:
        record = {
            "variants": found,
            "matrix_rate": rate,
            "floor_s": floor,
            "meta": provenance.record(vars(args)),
        }
        Path(args.output).write_text(json.dumps(record, indent=1))
    return found


if __name__ == "__main__":
    options.run(main, build_parser())
