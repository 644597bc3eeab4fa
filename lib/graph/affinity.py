"""Sparse affinity matrix of features: the weights of nearest neighbors, made symmetric.

The three published graphs differ in four choices only, so that they are presets of one function.
Nothing here is larger than 2 N K entries.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.graph.neighbors import Neighbors
from lib.graph.sparse import csr, from_scipy

LEAST_SCALE = 1e-5  # smallest local scale: below, distances of float32 vectors are rounding
EDGES = 2**26  # edges sorted at a time, which take 4 GB
SYMMETRIZE = ("mean", "max")


@dataclass(frozen=True)
class GraphPreset:
    """Choices that make an affinity matrix. With d = (1 - cos) / 2, a weight is exp(-factor d / scale)."""

    num_neighbors: int  # K, counting the image itself where it is its own neighbor
    include_self: bool  # whether an image is its own first neighbor (a self-loop of weight 1)
    factor: float
    scale: float | None  # None for the distance of the `scale_rank`-th neighbor
    scale_rank: int  # 1-based, the image itself never counted
    symmetrize: str  # "mean" is (W + W^T) / 2, "max" the elementwise maximum


PRESETS = {
    "cifar": GraphPreset(20, True, 2.0, 0.2, 0, "mean"),
    # published as 20 nearest with the image itself, which is then dropped
    "local-scale": GraphPreset(19, False, 2.0, None, 19, "max"),
    "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
}


def affinity_matrix(neighbors: Neighbors, preset: GraphPreset) -> Tensor:
    """Make the symmetric N x N affinity matrix W: CSR, float32, at most 2 N K entries, on their device.

    At its peak this takes 32 bytes for each of the N K neighbors on a CPU, 36 and a block of edges on a GPU,
    beside the neighbors themselves.

    Raises:
        ValueError: for an unknown symmetrization, or an infinite weight: products of features that are far
            off the unit sphere make negative distances.
    """
    if preset.scale is None:
        scale = (1 - neighbors.scale_similarities[:, None]) / 2
    else:
        scale = neighbors.similarities.new_full((), preset.scale)
    weights = 1 - neighbors.similarities
    weights *= -preset.factor / 2
    # Where even the neighbor that sets the scale is a duplicate, all distances are about 0, all weights 1.
    weights /= torch.where(scale.abs() < LEAST_SCALE, LEAST_SCALE, scale)
    weights.exp_()
    if not weights.amax().isfinite():
        raise ValueError(
            "weights of the graph are infinite, as the features are far off the unit sphere: scale their "
            "rows to unit length (--normalize on), or by one number"
        )
    if preset.symmetrize not in SYMMETRIZE:
        known = " or ".join(SYMMETRIZE)
        raise ValueError(f"unknown symmetrization {preset.symmetrize!r}: take {known}")
    symmetric = _symmetric_by_scipy if weights.device.type == "cpu" else _symmetric_by_sorting
    return symmetric(neighbors.indexes, weights, preset.symmetrize)


def _symmetric_by_scipy(columns: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Make the directed edges of N x K neighbors symmetric, by transposition."""
    n, k = weights.shape
    pointers = np.arange(0, n * k + 1, k, dtype=np.int32 if n * k < 2**31 else np.int64)
    columns = columns.flatten().clone()  # sorted in place below
    directed = sp.csr_matrix((weights.flatten().numpy(), columns.numpy(), pointers), (n, n))
    directed.sort_indices()
    if kind == "max":
        graph = directed.maximum(directed.T.tocsr())
    else:
        graph = directed + directed.T.tocsr()
        graph.data *= np.float32(0.5)
    graph.eliminate_zeros()  # a weight that underflowed is no edge
    return from_scipy(graph)


def _symmetric_by_sorting(
    columns: Tensor, weights: Tensor, kind: str, at_once: int = EDGES
) -> Tensor:
    """Do the same some rows at a time, by sorting the edges that start or end there: fast on a GPU alone.

    About `at_once` edges are sorted together.
    """
    n, k = weights.shape
    height = max(1, at_once // (2 * k))
    starts = range(0, n, height)
    parts = [_sorted_rows(columns, weights, kind, slice(s, min(s + height, n))) for s in starts]
    counts, found, values = (torch.cat(part) for part in zip(*parts, strict=True))
    crow = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
    crow = crow.int() if int(crow[-1]) < 2**31 else crow
    return csr(crow, found.to(crow.dtype), values, n)


def _sorted_rows(
    columns: Tensor, weights: Tensor, kind: str, own: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Make some rows of the symmetric matrix: the number of entries of each, their columns and values."""
    n = len(weights)
    source, rank = ((columns >= own.start) & (columns < own.stop)).nonzero(as_tuple=True)
    rows = torch.arange(own.stop - own.start, device=columns.device)
    # Each edge as one number, whose order is that of the matrix.
    out = (rows * n)[:, None] + columns[own]
    edges = torch.cat([out.flatten(), (columns[source, rank].long() - own.start) * n + source])
    edges, order = edges.sort()
    first = torch.cat([weights[own].flatten(), weights[source, rank]])[order]
    twice = edges[1:] == edges[:-1]  # found from both sides
    second = torch.zeros_like(first)
    second[:-1][twice] = first[1:][twice]
    joined = torch.maximum(first, second) if kind == "max" else (first + second) * 0.5
    kept = joined > 0  # a weight that underflowed is no edge
    kept[1:] &= ~twice
    edges = edges[kept]
    return torch.bincount(edges // n, minlength=len(rows)), (edges % n).int(), joined[kept]


def chosen_preset(preset: str | GraphPreset, num_neighbors: int | None = None) -> GraphPreset:
    """Look up a preset by its name, or raise ValueError; `num_neighbors` replaces K, and a rank that is K."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown graph {preset!r}: take one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if num_neighbors is None:
        return preset
    rank = num_neighbors if preset.scale_rank == preset.num_neighbors else preset.scale_rank
    return replace(preset, num_neighbors=num_neighbors, scale_rank=rank)
