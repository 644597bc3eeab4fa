"""From features to a sparse affinity matrix: weights of the nearest neighbors, symmetry, files.

The three graphs in use differ in four choices only, so that they are presets of one function.
Nothing here is larger than 2 N K entries.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.files import checkpoint, provenance
from lib.graph.neighbors import BLOCK_BYTES, Neighbors, nearest_neighbors

LEAST_SCALE = 1e-5  # of a local scale: below, distances of float32 vectors are rounding


@dataclass(frozen=True)
class GraphPreset:
    """How an affinity matrix is made. With d = (1 - cos) / 2, a weight is exp(-factor d / scale).

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
    """exp(-factor d / scale) of every neighbor: N x K, float32."""
    if preset.scale is None:
        scale = (1 - neighbors.scale_similarities.numpy()[:, None]) / 2
    else:
        scale = np.float32(preset.scale)
    weights = 1 - neighbors.similarities.numpy()
    weights *= np.float32(-preset.factor / 2)
    # where even the scale's own neighbor is a duplicate, all distances are about 0 and all weights 1
    weights /= np.maximum(scale, LEAST_SCALE)
    return np.exp(weights, out=weights)


def affinity(neighbors: Neighbors, preset: GraphPreset) -> sp.csr_matrix:
    """Symmetric N x N affinity matrix in CSR format, float32, int32 indexes, at most 2 N K entries.

    At its peak it takes 32 bytes for each of the N K neighbors, beside the neighbors themselves.
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
    """A preset by its name, with another number of neighbors where one is given.

    Args:
        preset: a name in `PRESETS`, or choices of your own.
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
    """Features (N x D unit vectors) -> symmetric sparse affinity matrix.

    Args:
        preset: a name in `PRESETS`, or choices of your own.
        num_neighbors: replaces the preset's K (and the rank of its scale, where that is K).
        method, precision, block_bytes: of the search, as in `nearest_neighbors`.
        path: a graph file: read instead of building, while it is of these features and choices;
            written otherwise.
        reuse: False builds it anew whatever lies at `path`.
        log: is told in one line what was built or read.
        search: `nearest_neighbors`, or what does the same in several processes.

    Raises:
        ValueError: for an unknown preset, fewer than two images, no neighbor, or a file at `path` that
            is no graph.
    """
    preset = chosen_preset(preset, num_neighbors=num_neighbors)
    origin = graph_meta(features, preset, method=method, precision=precision) if path else {}
    kept = _kept_graph(path, origin) if path and reuse else None
    if kept is not None:
        log(f"graph of {kept.shape[0]} images: read from {path}")
        return kept
    start = time.perf_counter()
    found = search(
        features,
        preset.num_neighbors,
        include_self=preset.include_self,
        scale_rank=preset.scale_rank,
        method=method,
        precision=precision,
        block_bytes=block_bytes,
    )
    graph = affinity(found, preset)
    seconds = time.perf_counter() - start
    if path:
        save_graph(graph, path, origin | {"recall": found.recall})
    log(
        f"graph of {graph.shape[0]} images: built in {seconds:.1f} s, {graph.nnz} entries, recall "
        f"{found.recall:.4f}" + (f", kept in {path}" if path else "")
    )
    return graph


def _kept_graph(path: str | Path, origin: Mapping[str, Any]) -> sp.csr_matrix | None:
    """The graph in a file, if there is one and it was made from the same."""
    if not Path(path).is_file():
        return None
    graph, meta = load_graph(path)
    return graph if all(meta.get(name) == value for name, value in origin.items()) else None


def graph_meta(
    features: Tensor, preset: GraphPreset, *, method: str = "auto", precision: str = "auto"
) -> dict[str, Any]:
    """What a graph is made from: the digest of the features and every choice."""
    search = {"method": method, "precision": precision}
    return {"features_digest": features_digest(features), "preset": asdict(preset)} | search


def features_digest(features: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of N x D features."""
    return hashlib.sha256(features.detach().cpu().contiguous().numpy()).hexdigest()[:16]


def save_graph(affinity: sp.csr_matrix, path: str | Path, meta: Mapping[str, Any]) -> None:
    """Write a graph as plain tensors: `crow`, `col`, `values`, `shape`, and the record `meta`.

    Raises:
        ValueError: if the file cannot be written; an old one stays.
    """
    state = {
        "crow": torch.from_numpy(affinity.indptr),
        "col": torch.from_numpy(affinity.indices),
        "values": torch.from_numpy(affinity.data),
        "shape": list(affinity.shape),
        "meta": provenance.made_by() | dict(meta),
    }
    checkpoint.save(state, path)


def load_graph(path: str | Path) -> tuple[sp.csr_matrix, dict[str, Any]]:
    """A graph of `save_graph` and its `meta`.

    Raises:
        ValueError: if the file is missing or no graph: a square, symmetric CSR matrix of finite,
            non-negative float32 weights.
    """
    keys = ("crow", "col", "values", "shape", "meta")
    state = checkpoint.load_dict(path, *keys)
    crow, col, values, shape, meta = (state[key] for key in keys)
    problem = _csr_problem(crow, col, values, shape)
    if not problem and not isinstance(meta, dict):
        problem = "its meta is no record"
    if problem:
        raise ValueError(f"{path} holds no graph: {problem}; delete it to build it again")
    graph = sp.csr_matrix((values.numpy(), col.numpy(), crow.numpy()), tuple(shape))
    # both products read the same arrays, where a transposed copy would double them
    probe = np.random.default_rng(0).random(len(crow) - 1, dtype=np.float32)
    if not np.allclose(graph @ probe, graph.T @ probe, rtol=1e-3, atol=1e-30):
        raise ValueError(f"{path} holds no graph: it is not symmetric; delete it to build it again")
    return graph, meta


def _csr_problem(crow: Any, col: Any, values: Any, shape: Any) -> str:
    """What keeps these from being a square CSR matrix of weights; empty if nothing does."""
    vectors = (crow, col, values)
    if not all(
        isinstance(v, Tensor) and v.layout == torch.strided and v.ndim == 1 for v in vectors
    ):
        return "crow, col and values must be vectors"
    if any(v.dtype not in (torch.int32, torch.int64) for v in (crow, col)) or (
        values.dtype != torch.float32
    ):
        return "crow and col must be integers, values float32"
    n = len(crow) - 1
    if n < 1 or not isinstance(shape, list) or shape != [n, n]:
        return f"a shape of {shape} for {n} rows"
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or (crow.diff() < 0).any():
        return "crow does not rise from 0 to the number of entries"
    if len(col) != len(values) or (len(col) and not (0 <= int(col.min()) <= int(col.max()) < n)):
        return "a column out of range, or not one per value"
    if not torch.isfinite(values).all() or (values < 0).any():
        return "a weight is negative, NaN or infinite"
    return ""
