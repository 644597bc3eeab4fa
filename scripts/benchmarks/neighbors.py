"""Compare the approximate neighbor search by cells with an inverted file of FAISS at equal recall.

    pip install faiss-cpu
    python scripts/benchmarks/neighbors.py --images 200000 --repetitions 3

Both search the 20 nearest neighbors of every point of the synthetic mixture of
scripts/benchmarks/propagation.py.
The recall of lib/graph/cells.py is measured on a sample; FAISS then probes as few lists as give the same
recall. Its index is built whole, but searched for --queries points only and their time scaled to all of them,
as each query costs by itself. The seconds of the processor count all threads, and change little with what
else the machine does; seconds on the clock are printed beside them.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from lib.cli import declared, start
from lib.graph.cells import search_cells
from lib.graph.neighbors import TIE
from lib.graph.search import FIRST, exact_search

mixture = start.load_script("scripts/benchmarks/propagation.py").mixture
K = 20
SAMPLE = 2000  # points whose exact neighbors recall is measured with
LISTS_PER_ROOT = (4, 8)  # lists of FAISS for each square root of N; the faster choice counts
KMEANS_ROUNDS, ROWS_PER_LIST = 5, 16  # as in lib/graph/cells.py


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument(
        "--images", type=declared.positive_int, default=200_000, metavar="N", help="points"
    )
    parser.add_argument(
        "--classes", type=declared.positive_int, default=1000, help="classes of the mixture"
    )
    parser.add_argument(
        "--repetitions", type=declared.positive_int, default=3, help="of both, one after the other"
    )
    parser.add_argument(
        "--queries", type=declared.positive_int, default=10_000, help="points that FAISS searches"
    )
    return parser


def clock() -> np.ndarray:
    """Return seconds on the clock and seconds of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def recall(cosines: Tensor, exact: Tensor) -> float:
    """Compute the share of exact neighbors found, the points themselves left out."""
    return float((cosines[:, 1:] >= exact[:, -1:] - TIE).float().mean())


def by_cells(points: Tensor) -> tuple[np.ndarray, Tensor]:
    """Search all points by cells: seconds and cosines."""
    start = clock()
    rows, n = slice(0, len(points)), len(points)
    found = search_cells(points, K, rows, FIRST)
    if found is None:
        raise ValueError(f"--images {n}: exact search is faster for so few points")
    return clock() - start, found[0]


def build_index(points: Tensor, num_lists: int):
    """Build an inverted file of FAISS: the index and seconds."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    dim, start = points.shape[1], clock()
    flat = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(flat, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = KMEANS_ROUNDS, ROWS_PER_LIST
    index.cp.min_points_per_centroid, index.cp.spherical = 1, True
    index.train(points.numpy())
    index.add(points.numpy())
    return index, clock() - start


def fewest_probes(index, sample: Tensor, exact: Tensor, wanted: float) -> int:
    """Find the least number of lists to probe that gives the wanted recall, to one sixteenth."""

    def reached(probes: int) -> bool:
        index.nprobe = probes
        return recall(torch.from_numpy(index.search(sample.numpy(), K)[0]), exact) >= wanted

    low, high = 0, 8
    while high < index.nlist and not reached(high):
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def by_faiss(points: Tensor, num_lists: int, probes: int, num_queries: int) -> np.ndarray:
    """Build the index and search some points: seconds for all of them."""
    index, seconds = build_index(points, num_lists)
    index.nprobe, start = probes, clock()
    queries = points[torch.randperm(len(points))[:num_queries]].numpy()
    index.search(queries, K)
    return seconds + (clock() - start) * len(points) / len(queries)


def main(args: argparse.Namespace) -> dict[str, list[float]]:
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("FAISS is not installed: pip install faiss-cpu")
    points, _ = mixture(args.images, args.classes)
    ids = torch.randperm(args.images, generator=torch.Generator().manual_seed(0))[:SAMPLE]
    exact, _ = exact_search(points[ids], points, K, own=ids, own_value=FIRST)
    seconds, cosines = by_cells(points)
    wanted, found = recall(cosines[ids], exact), {"cells": [seconds], "faiss": []}
    del cosines
    choices = []
    for per_root in LISTS_PER_ROOT:
        num_lists = round(per_root * args.images**0.5)
        index, _ = build_index(points, num_lists)
        choices.append((num_lists, fewest_probes(index, points[ids], exact, wanted)))
        del index
    print(f"{args.images} points, recall {wanted:.4f}; lists and probes of FAISS: {choices}")
    for repetition in range(args.repetitions):
        if repetition:
            found["cells"].append(by_cells(points)[0])
        runs = [by_faiss(points, *choice, args.queries) for choice in choices]
        found["faiss"].append(min(runs, key=lambda run: run[1]))
        cells, faiss = found["cells"][-1], found["faiss"][-1]
        print(
            f"processor: cells {cells[1]:.1f} s, faiss {faiss[1]:.1f} s; clock: cells {cells[0]:.1f} s, "
            f"faiss {faiss[0]:.1f} s; {faiss[1] / cells[1]:.2f} times the processor of the cells",
            flush=True,
        )
    return {name: [float(run[1]) for run in runs] for name, runs in found.items()}


if __name__ == "__main__":
    start.run(main, build_parser())
