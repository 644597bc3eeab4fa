"""Sparse affinity matrix of features: the weights of nearest neighbors, made symmetric.

The three published graphs differ in four choices only, so that they are presets of one function.
Nothing here is larger than 2 N K entries.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from torch import Tensor

from lib.files.cache import load_or_compute
from lib.graph.files import load_graph, save_graph
from lib.graph.neighbors import BLOCK_BYTES, Neighbors, nearest_neighbors

LEAST_SCALE = 1e-5  # smallest local scale: below, distances of float32 vectors are rounding


@dataclass(frozen=True)
class GraphPreset:
    """Choices that make an affinity matrix. With d = (1 - cos) / 2, a weight is exp(-factor d / scale).

    Attributes:
        num_neighbors: K, counting the image itself where `include_self`.
        include_self: whether an image is its own first neighbor (a self-loop of weight 1).
        factor: multiplies the distance.
        scale: a constant, or None for the distance of the `scale_rank`-th neighbor.
        scale_rank: 1-based rank of that neighbor, the image itself never counted.
        symmetrize: "mean" is (W + W^T) / 2, "max" the elementwise maximum.
    """

    num_neighbors: int
    include_self: bool
    factor: float
    scale: float | None
    scale_rank: int
    symmetrize: str


PRESETS = {
    "cifar": GraphPreset(20, True, 2.0, 0.2, 0, "mean"),
    "local-scale": GraphPreset(20, False, 2.0, None, 20, "max"),
    "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
}


def _ignore(_: str) -> None:
    pass


def _weights(neighbors: Neighbors, preset: GraphPreset) -> np.ndarray:
    """Compute exp(-factor d / scale) for every neighbor: N x K, float32."""
    if preset.scale is None:
        scale = (1 - neighbors.scale_similarities.numpy()[:, None]) / 2
    else:
        scale = np.float32(preset.scale)
    weights = 1 - neighbors.similarities.numpy()
    weights *= np.float32(-preset.factor / 2)
    # Where even the neighbor that sets the scale is a duplicate, all distances are about 0, all weights 1.
    weights /= np.maximum(scale, LEAST_SCALE)
    return np.exp(weights, out=weights)


def affinity(neighbors: Neighbors, preset: GraphPreset) -> sp.csr_matrix:
    """Make the symmetric N x N affinity matrix W: CSR format, float32, at most 2 N K entries.

    At its peak this takes 32 bytes for each of the N K neighbors, beside the neighbors themselves.
    """
    n, k = neighbors.indexes.shape
    weights = _weights(neighbors, preset)
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


def chosen_preset(
    preset: str | GraphPreset = "cifar", *, num_neighbors: int | None = None
) -> GraphPreset:
    """Look up a preset by its name, with another number of neighbors where one is given.

    Args:
        preset: a name in `PRESETS`, or your own choices.
        num_neighbors: replaces the preset's K (and the rank of its scale, where that is K).

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown graph {preset!r}: take one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if num_neighbors is None:
        return preset
    rank = num_neighbors if preset.scale_rank == preset.num_neighbors else preset.scale_rank
    return replace(preset, num_neighbors=num_neighbors, scale_rank=rank)


def build_graph(
    features: Tensor,
    preset: str | GraphPreset = "cifar",
    *,
    num_neighbors: int | None = None,
    method: str = "auto",
    precision: str = "auto",
    block_bytes: int = BLOCK_BYTES,
    path: str | Path = "",
    reuse: bool = True,
    log: Callable[[str], None] = _ignore,
    search: Callable[..., Neighbors] = nearest_neighbors,
) -> sp.csr_matrix:
    """Build the symmetric sparse affinity matrix W of features (N x D unit vectors).

    Args:
        features: N x D unit vectors.
        preset: a name in `PRESETS`, or your own choices.
        num_neighbors: replaces the preset's K (and the rank of its scale, where that is K).
        method, precision, block_bytes: options of the search, as in `nearest_neighbors`.
        path: a graph file, read in place of building while it is of these features and choices, and
            written otherwise.
        reuse: False builds the graph anew, whatever lies at `path`.
        log: receives one line about what was built or read.
        search: `nearest_neighbors`, or a function that does the same in several processes.

    Raises:
        ValueError: for an unknown preset, fewer than two images, no neighbor, or a file at `path` that
            does not hold a graph.
    """
    preset = chosen_preset(preset, num_neighbors=num_neighbors)
    key = graph_meta(features, preset, method=method, precision=precision) if path else {}

    def compute() -> tuple[sp.csr_matrix, dict[str, Any]]:
        found = search(
            features,
            preset.num_neighbors,
            include_self=preset.include_self,
            scale_rank=preset.scale_rank,
            method=method,
            precision=precision,
            block_bytes=block_bytes,
        )
        return affinity(found, preset), {"recall": found.recall}

    loaded = load_or_compute(path, key, compute, load_graph, save_graph, reuse=reuse)
    graph, recall = loaded.value, loaded.meta.get("recall", 1.0)
    log(
        f"graph of {graph.shape[0]} images: {loaded.origin('built')}; {graph.nnz} entries, recall "
        f"{recall:.4f}"
    )
    return graph


def graph_meta(
    features: Tensor, preset: GraphPreset, *, method: str = "auto", precision: str = "auto"
) -> dict[str, Any]:
    """Describe what a graph is made from: the digest of the features and every choice."""
    search = {"method": method, "precision": precision}
    return {"features_digest": features_digest(features), "preset": asdict(preset)} | search


def features_digest(features: Tensor) -> str:
    """Digest N x D features: 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(features.detach().cpu().contiguous().numpy()).hexdigest()[:16]
