"""Sparse affinity matrix of features: the weights of nearest neighbors, made symmetric.

The three published graphs differ in four choices only, so that they are presets of one function.
Nothing here is larger than 2 N K entries.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from lib.graph.neighbors import Neighbors

LEAST_SCALE = 1e-5  # smallest local scale: below, distances of float32 vectors are rounding


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
    "local-scale": GraphPreset(20, False, 2.0, None, 20, "max"),
    "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
}


def affinity_matrix(neighbors: Neighbors, preset: GraphPreset) -> sp.csr_matrix:
    """Make the symmetric N x N affinity matrix W: CSR format, float32, at most 2 N K entries.

    At its peak this takes 32 bytes for each of the N K neighbors, beside the neighbors themselves.
    """
    if preset.scale is None:
        scale = (1 - neighbors.scale_similarities.numpy()[:, None]) / 2
    else:
        scale = np.float32(preset.scale)
    weights = 1 - neighbors.similarities.numpy()
    weights *= np.float32(-preset.factor / 2)
    # Where even the neighbor that sets the scale is a duplicate, all distances are about 0, all weights 1.
    weights /= np.maximum(scale, LEAST_SCALE)
    np.exp(weights, out=weights)
    n, k = weights.shape
    pointers = np.arange(0, n * k + 1, k, dtype=np.int32 if n * k < 2**31 else np.int64)
    columns = neighbors.indexes.numpy().ravel().copy()  # sorted in place below
    directed = sp.csr_matrix((weights.ravel(), columns, pointers), (n, n))
    directed.sort_indices()
    if preset.symmetrize == "max":
        graph = directed.maximum(directed.T.tocsr())
    elif preset.symmetrize == "mean":
        graph = directed + directed.T.tocsr()
        graph.data *= np.float32(0.5)
    else:
        raise ValueError(f"unknown symmetrization {preset.symmetrize!r}: take mean or max")
    graph.eliminate_zeros()  # a weight that underflowed is no edge
    return graph


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
